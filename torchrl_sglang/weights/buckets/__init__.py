"""Which tensors travel together, and their bytes. May import: ``checkpoint``."""
