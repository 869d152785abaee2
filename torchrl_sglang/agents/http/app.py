"""The gateway as an ASGI application."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from torchrl_sglang.agents.http.api_errors import ApiError
from torchrl_sglang.agents.http.json_body import ClientDisconnect
from torchrl_sglang.agents.http.model_routes import ModelRoutes
from torchrl_sglang.agents.http.serving import Serving
from torchrl_sglang.agents.http.session_routes import SessionRoutes
from torchrl_sglang.agents.http.translation import api_error
from torchrl_sglang.errors import SGLangError

__all__ = ["make_app"]

_SESSION = "/sessions/{session}"
_CLIENT_GONE = 499


def make_app(serving: Serving) -> Starlette:
    """The application that serves agents.

    Args:
        serving: the sessions, and how they are served.
    """
    sessions, model = SessionRoutes(serving), ModelRoutes(serving)
    routes = [
        Route("/health", _health, methods=["GET"]),
        Route("/sessions", sessions.create, methods=["POST"]),
        Route(_SESSION, sessions.show, methods=["GET"]),
        Route(_SESSION, sessions.delete, methods=["DELETE"]),
        Route(f"{_SESSION}/reward", sessions.reward, methods=["POST"]),
        Route(f"{_SESSION}/trajectories", sessions.trajectories, methods=["GET"]),
        Route(f"{_SESSION}/v1/models", model.models, methods=["GET"]),
        Route(f"{_SESSION}/v1/models/{{name:path}}", model.model, methods=["GET"]),
        Route(f"{_SESSION}/v1/chat/completions", model.chat, methods=["POST"]),
        Route(f"{_SESSION}/v1/completions", model.completions, methods=["POST"]),
        Route(f"{_SESSION}/v1/responses", model.responses, methods=["POST"]),
        Route(f"{_SESSION}/v1/messages", model.messages, methods=["POST"]),
        # Anthropic's clients add /v1 to the address that they are given.
        Route(f"{_SESSION}/v1/v1/messages", model.messages, methods=["POST"]),
    ]
    handlers: Mapping[Any, Any] = {
        ApiError: _api_error,
        SGLangError: _package_error,
        HTTPException: _http_error,
        ClientDisconnect: _client_gone,
        Exception: _unexpected,
    }
    return Starlette(routes=routes, exception_handlers=handlers)


async def _health(_request: Request) -> Response:
    return JSONResponse({"status": "ok"})


def error_response(request: Request, error: ApiError) -> Response:
    """An error in the form of the API that the request uses."""
    is_anthropic = "/messages" in request.url.path or "anthropic-version" in request.headers
    body = error.anthropic() if is_anthropic else error.openai()
    return JSONResponse(body, error.status, headers=error.headers)


async def _api_error(request: Request, error: ApiError) -> Response:
    return error_response(request, error)


async def _package_error(request: Request, error: SGLangError) -> Response:
    return error_response(request, api_error(error))


async def _http_error(request: Request, error: HTTPException) -> Response:
    """No such route, or not with this method."""
    what = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        message = (
            f"there is no {what}. A session's address is /sessions/ID/v1, with /chat/completions, /completions, "
            "/responses, /messages and /models"
        )
    else:
        message = f"{what}: {error.detail}"
    answer = error_response(request, ApiError(error.status_code, message, code="not_found"))
    answer.headers.update(error.headers or {})
    return answer


async def _client_gone(_request: Request, _error: ClientDisconnect) -> Response:
    return Response(status_code=_CLIENT_GONE)  # nobody reads it


async def _unexpected(request: Request, error: Exception) -> Response:
    """An error of the gateway itself; the server logs its traceback."""
    message = f"the gateway failed ({type(error).__name__}); its log has the traceback"
    return error_response(request, ApiError(500, message, code="internal_error"))
