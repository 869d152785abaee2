"""Configuration, models, optimizer and servers. May import: nothing else of the recipes."""
