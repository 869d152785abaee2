"""What the trainer has, as ``(name, tensor)`` pairs under checkpoint names. May import: ``checkpoint``."""
