"""SGLang's HTTP contract as pure functions: requests are built and replies parsed without a socket or a tensor."""
