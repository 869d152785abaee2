"""One update on the servers: session, liveness, verification, report. May import: ``buckets``, ``group``, pool."""
