"""A session's conversations as a tree of token segments. Pure functions and records: nothing is sent from here."""
