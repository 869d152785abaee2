"""Tensors of the served checkpoint, and checks of the trainer's against them. May import: nothing of ``weights``."""
