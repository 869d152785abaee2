"""The trainer's weights as ``(checkpoint name, tensor)`` pairs. May import: ``checkpoint``."""
