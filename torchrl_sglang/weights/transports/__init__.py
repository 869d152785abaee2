"""How weights get to servers: one interface, one file per transport. May import every folder beside it."""
