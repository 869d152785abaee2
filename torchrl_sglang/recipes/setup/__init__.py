"""Lowest layer of the recipes: settings, command line, models, optimizer and servers.

May import: no other folder of ``recipes``. Order: setup < data < batch < losses < run < tools.
"""
