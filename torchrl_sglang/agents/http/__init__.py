"""The gateway's HTTP interface: OpenAI's and Anthropic's APIs, read and written; Starlette is imported here alone."""
