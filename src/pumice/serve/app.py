"""The ASGI application: routes, request bodies and the order of the middleware."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pumice import __version__
from pumice.assistant import most_pictures
from pumice.errors import cut
from pumice.serve.answers import ModelResponse
from pumice.serve.backend import Backend
from pumice.serve.errors import ApiError, unknown_model
from pumice.serve.guard import Gate, Guard, too_large
from pumice.serve.metrics import CONTENT_TYPE
from pumice.serve.observe import Observe, RequestRecord, request_record
from pumice.serve.ollama import OllamaVersion
from pumice.serve.openapi import OPERATIONS, document
from pumice.serve.page import files, send
from pumice.serve.protocol import Health, ModelCard, ModelList
from pumice.serve.settings import ServerSettings
from pumice.serve.stream import run_while_connected
from pumice.serve.work import BODY_COPIES

ELSEWHERE = {  # what clients ask for that is somewhere else: with /v1 left out or doubled, of TGI, of Ollama
    "/chat/completions": "/v1/chat/completions",
    "/completions": "/v1/completions",
    "/responses": "/v1/responses",
    "/messages": "/v1/messages",
    "/models": "/v1/models",
    "/v1": "/v1/models",
    "/v1/v1/chat/completions": "/v1/chat/completions",
    "/v1/v1/messages": "/v1/messages",
    "/v1/api/chat": "/api/chat",
    "/generate": "/v1/chat/completions",
    "/generate_stream": "/v1/chat/completions",
    "/completion": "/v1/completions",
}

Endpoint = Callable[[Request], Awaitable[Response]]


def build(settings: ServerSettings, backend: Backend, gate: Gate, is_built_in: bool) -> Starlette:
    """Return the ASGI application. is_built_in: the model is the one that comes with Pumice."""
    started = int(time.time())
    openapi_document = document(__version__)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await backend.start()
        try:
            yield
        finally:
            await backend.close()

    def answering(work: Callable[[RequestRecord, bytes], Any]) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            record = request_record(request)
            return await run_while_connected(
                request, work(record, await _body(request, settings)), settings.timeout
            )

        return endpoint

    async def models(_: Request) -> Response:
        return ModelResponse(ModelList(object="list", data=[card(name) for name in backend.names]))

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if not name:  # a slash at the end
            return await models(request)
        if name not in backend.names:
            raise unknown_model(name, backend.names)
        return ModelResponse(card(name))

    def card(name: str) -> ModelCard:
        return ModelCard(
            id=name, object="model", created=started, owned_by="pumice",
            max_pictures=most_pictures(backend.assistant.model.config), built_in=is_built_in,
        )  # fmt: skip

    async def health(_: Request) -> Response:
        state = Health(status="draining" if gate.draining else "ok", version=__version__)
        return ModelResponse(state, 503 if gate.draining else 200, {"Cache-Control": "no-store"})

    async def prometheus(_: Request) -> Response:
        return Response(backend.metrics.text(), media_type=CONTENT_TYPE)

    async def openapi(_: Request) -> Response:
        return JSONResponse(openapi_document)

    async def ollama_models(_: Request) -> Response:
        return ModelResponse(backend.ollama_card.models())

    async def ollama_version(_: Request) -> Response:
        return ModelResponse(OllamaVersion(version=__version__))

    endpoints: dict[str, Endpoint] = {
        "chat": answering(backend.chat), "complete": answering(backend.complete),
        "respond": answering(backend.respond), "message": answering(backend.message),
        "ollamaChat": answering(backend.ollama_chat), "ollamaGenerate": answering(backend.ollama_generate),
        "ollamaShow": answering(backend.ollama_show), "ollamaModels": ollama_models,
        "ollamaVersion": ollama_version,
        "explain": answering(backend.explain), "boxes": answering(backend.boxes),
        "models": models, "model": model, "health": health, "metrics": prometheus,
    }  # fmt: skip
    routes = [
        Route(
            operation.path.replace("{name}", "{name:path}"),
            endpoints[operation.name],
            methods=["POST" if operation.request is not None else "GET"],
        )
        for operation in OPERATIONS
    ]
    routes.append(Route("/openapi.json", openapi, methods=["GET"]))
    routes += [Route(path, send(file), methods=["GET"]) for path, file in files().items()]
    paths = frozenset(route.path for route in routes)
    middleware = [Middleware(Observe, metrics=backend.metrics, paths=paths)]
    if settings.cors:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["X-Request-Id", "Retry-After"],
            )
        )
    middleware.append(Middleware(Guard, settings=settings, gate=gate))
    handlers: dict[Any, Any] = {ApiError: _api_error, HTTPException: _http_error}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)


async def _body(request: Request, settings: ServerSettings) -> bytes:
    """Return the body of a request. Raises ApiError when it is too large or arrives too slowly."""
    data, limit, memory = bytearray(), settings.body_bytes, request_record(request).memory
    try:
        with anyio.fail_after(settings.body_timeout):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limit:
                    raise too_large(limit)
                memory.take(BODY_COPIES * len(chunk))
    except TimeoutError:
        raise ApiError(
            408, f"the request did not arrive within {settings.body_timeout:g} s", code="request_timeout"
        ) from None
    return bytes(data)


async def _api_error(request: Request, error: ApiError) -> Response:
    request_record(request).add_error(error)
    return error.response(request.url.path)


async def _http_error(request: Request, error: HTTPException) -> Response:
    path = cut(request.url.path)
    instead = ELSEWHERE.get(path.rstrip("/"))
    if error.status_code == 405:
        message = f"{path} does not accept {request.method}; /openapi.json lists the methods"
    elif error.status_code == 404 and instead:
        message = f"there is nothing at {path}; ask at {instead}"
    elif error.status_code == 404:
        message = f"there is nothing at {path!r}; /openapi.json lists what is there"
    else:
        message = error.detail
    return await _api_error(request, ApiError(error.status_code, message, headers=error.headers))
