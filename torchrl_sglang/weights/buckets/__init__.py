"""Which tensors share a request, and how their bytes are packed. May import: ``checkpoint``."""
