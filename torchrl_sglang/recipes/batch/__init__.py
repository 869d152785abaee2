"""A batch of answers as flat tensors, and statistics of it.

May import: ``setup``, ``data``. Order: setup < data < batch < losses < run < tools.
"""
