"""What a server's checksums must be after a push: from the bytes sent. May import ``buckets``."""
