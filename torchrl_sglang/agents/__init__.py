"""Agents written with any OpenAI client, recorded token by token.

Needs the extra ``agents`` (an ASGI framework and server, and an async HTTP client), which is imported on first use.
"""

__all__ = ["PACKAGES"]

PACKAGES = ("starlette", "uvicorn", "aiohttp", "orjson")
"""What the extra ``agents`` brings and the gateway can't do without."""
