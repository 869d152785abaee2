"""A training run: its folder, metrics, checkpoints and evaluation. May import: ``batch``, ``setup``."""
