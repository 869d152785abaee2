"""The process group of trainer and servers: rendezvous, broadcast, bucket loop.

``update`` and ``transports`` import its modules, and the engine :func:`.reachable_address`. It imports ``buckets``.
"""
