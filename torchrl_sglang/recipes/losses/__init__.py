"""Losses, critics and reference models. May import: ``data``, ``batch``, ``setup``."""
