"""SGLang's HTTP API as pure functions: they build requests and parse replies, without a socket or a tensor.

Other folders import from this package's modules by name. This folder imports ``errors`` and ``config`` only.
"""
