"""The gateway as an ASGI application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from torchrl_sglang.agents.http.api_errors import ApiError
from torchrl_sglang.agents.http.json_body import ClientDisconnect
from torchrl_sglang.agents.http.json_reply import JsonReply
from torchrl_sglang.agents.http.model_routes import ModelRoutes
from torchrl_sglang.agents.http.serving import Serving
from torchrl_sglang.agents.http.session_routes import SessionRoutes
from torchrl_sglang.agents.http.translation import api_error
from torchrl_sglang.errors import SGLangError

__all__ = ["make_app"]

_SESSION = "/sessions/{session}"
_CLIENT_GONE = 499


Answer = Callable[[Request], Awaitable[Response]]


def make_app(serving: Serving) -> ASGIApp:
    """The application that serves agents.

    It is made of Starlette's router and one layer for errors: the application class of Starlette puts every request
    through four, which took a tenth of the time of a turn.

    Args:
        serving: the sessions, and how they are served.
    """
    sessions, model = SessionRoutes(serving), ModelRoutes(serving)
    routes = [
        # Routes are tried in this order: those that agents ask for come first.
        _route("POST", f"{_SESSION}/v1/chat/completions", model.chat),
        _route("POST", f"{_SESSION}/v1/responses", model.responses),
        _route("POST", f"{_SESSION}/v1/messages", model.messages),
        # Anthropic's clients add /v1 to the address that they are given.
        _route("POST", f"{_SESSION}/v1/v1/messages", model.messages),
        _route("POST", f"{_SESSION}/v1/completions", model.completions),
        _route("POST", f"{_SESSION}/v1/messages/count_tokens", model.count_tokens),
        _route("POST", f"{_SESSION}/v1/v1/messages/count_tokens", model.count_tokens),
        _route("POST", "/sessions", sessions.create),
        _route("GET", _SESSION, sessions.show),
        _route("DELETE", _SESSION, sessions.delete),
        _route("POST", f"{_SESSION}/reward", sessions.reward),
        _route("GET", f"{_SESSION}/trajectories", sessions.trajectories),
        _route("GET", f"{_SESSION}/v1/models", model.models),
        _route("GET", f"{_SESSION}/v1/models/{{name:path}}", model.model),
        _route("GET", f"{_SESSION}/v1/v1/models", model.models),
        _route("GET", f"{_SESSION}/v1/v1/models/{{name:path}}", model.model),
        # Clients ask their base address whether anybody is there.
        _route("GET", f"{_SESSION}/v1", _health),
        _route("GET", "/health", _health),
    ]
    return ServerErrorMiddleware(_Application(Router(routes)), handler=_unexpected)


def _route(method: str, path: str, answer: Answer) -> Route:
    return Route(path, _Endpoint(answer), methods=[method])


class _Endpoint:
    """One route. Starlette wraps functions, but not objects, in a layer for errors of their own."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._answer(Request(scope, receive, send))
        await response(scope, receive, send)


class _Application:
    """The routes; a request that can't be honoured is answered with its error."""

    def __init__(self, routes: ASGIApp) -> None:
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self  # tells the router to raise what it has no route for
        try:
            await self._routes(scope, receive, send)
            return
        except ApiError as error:
            response = error_response(Request(scope), error)
        except SGLangError as error:
            response = error_response(Request(scope), api_error(error))
        except HTTPException as error:
            response = _no_route(Request(scope), error)
        except ClientDisconnect:
            response = Response(status_code=_CLIENT_GONE)  # nobody reads it
        await response(scope, receive, send)


async def _health(_request: Request) -> Response:
    return JsonReply({"status": "ok"})


def error_response(request: Request, error: ApiError) -> Response:
    """An error in the form of the API that the request uses."""
    is_anthropic = "/messages" in request.url.path or "anthropic-version" in request.headers
    body = error.anthropic() if is_anthropic else error.openai()
    return JsonReply(body, error.status, headers=error.headers)


def _no_route(request: Request, error: HTTPException) -> Response:
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


async def _unexpected(request: Request, error: Exception) -> Response:
    """An error of the gateway itself; the server logs its traceback."""
    message = f"the gateway failed ({type(error).__name__}); its log has the traceback"
    return error_response(request, ApiError(500, message, code="internal_error"))
