"""The steps of one update on the servers: liveness check, session, verification, report.

``transports`` and ``sync.py`` import its modules. It imports ``buckets``, ``group`` and what they may import.
"""
