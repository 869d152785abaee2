"""Python as a tool in conversations. May import: ``data``, ``batch``, ``run``."""
