"""Token scores, losses, critics and reference models.

May import: ``setup``, ``data``, ``batch``. Order: setup < data < batch < losses < run < tools.
"""
