"""How weights get to the servers: one interface, and one module per transport.

``sync.py`` imports the interface and :func:`.make_transport`. These modules import all the folders beside this one.
"""
