"""A training run: its folder, metrics, checkpoints, report and background rollouts.

May import: ``setup``, ``data``, ``batch``, ``losses``. Order: setup < data < batch < losses < run < tools.
"""
