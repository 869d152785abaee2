"""Highest layer of the recipes: Python as a tool in conversations.

May import: every other folder of ``recipes``. Order: setup < data < batch < losses < run < tools.
"""
