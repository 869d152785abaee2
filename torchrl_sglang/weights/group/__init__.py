"""The process group of trainer and servers: rendezvous, broadcast, bucket loop. May import: ``buckets``, pool."""
