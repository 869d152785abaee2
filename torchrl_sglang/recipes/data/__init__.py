"""Questions, tasks, rewards, environments and their evaluation.

May import: ``setup``. Order: setup < data < batch < losses < run < tools.
"""
