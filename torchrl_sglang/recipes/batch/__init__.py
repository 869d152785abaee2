"""A batch of answers as tensors, and numbers about it. May import: ``data``."""
