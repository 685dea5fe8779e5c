"""The application: which address does what.

Knows routes, bodies and the order of the layers around them. How an answer is made, the backend knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
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
from pumice.serve.backend import Backend, Call
from pumice.serve.errors import ApiError
from pumice.serve.guard import Gate, Guard, too_large
from pumice.serve.metrics import CONTENT_TYPE, Metrics
from pumice.serve.observe import Observe, record
from pumice.serve.openapi import document
from pumice.serve.page import files, send
from pumice.serve.settings import ServerSettings


def build(settings: ServerSettings, backend: Backend, metrics: Metrics, gate: Gate) -> Starlette:
    """The ASGI application of one worker."""
    started = int(time.time())
    metrics.levels = backend.levels
    published = document(__version__)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await backend.start(metrics)
        ticking = asyncio.create_task(_tick(metrics)) if metrics.shared else None
        try:
            yield
        finally:
            if ticking is not None:
                ticking.cancel()
            await backend.close()

    async def call(request: Request) -> Call:
        return Call(request, await _body(request, settings))

    async def chat(request: Request) -> Response:
        return await backend.chat(await call(request))

    async def complete(request: Request) -> Response:
        return await backend.complete(await call(request))

    async def explain(request: Request) -> Response:
        return await backend.explain(await call(request))

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card(name) for name in await backend.models()]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        known = await backend.models()
        if name not in known:
            raise ApiError(404, f"there is no model {name!r} here", param="model", code="model_not_found")
        return JSONResponse(card(name))

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "pumice"}

    async def health(_: Request) -> Response:
        ready = not gate.draining and await backend.ready()
        told = {
            "status": "draining" if gate.draining else "ok" if ready else "away",
            "version": __version__,
        }
        return JSONResponse(told, 200 if ready else 503, {"Cache-Control": "no-store"})

    async def prometheus(_: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    async def openapi(_: Request) -> Response:
        return JSONResponse(published)

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/explain", explain, methods=["POST"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", model, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/metrics", prometheus, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
        *(Route(path, send(file), methods=["GET"]) for path, file in files().items()),
    ]
    paths = frozenset(route.path for route in routes)
    layers = [Middleware(Observe, metrics=metrics, paths=paths)]
    if settings.cors:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["X-Request-Id", "Retry-After"],
            )
        )
    layers.append(Middleware(Guard, settings=settings, gate=gate))
    handlers: dict[Any, Any] = {ApiError: _api_error, HTTPException: _http_error}
    return Starlette(routes=routes, middleware=layers, exception_handlers=handlers, lifespan=lifespan)


async def _tick(metrics: Metrics) -> None:
    while True:
        metrics.refresh()
        await asyncio.sleep(1)


async def _body(request: Request, settings: ServerSettings) -> bytes:
    """A request's body, within the limits of size and time."""
    data = bytearray()
    try:
        with anyio.fail_after(settings.body_timeout):
            async for chunk in request.stream():
                data += chunk
                if len(data) > settings.max_body:
                    raise too_large(settings.max_body)
    except TimeoutError:
        raise ApiError(
            408, f"the request did not arrive within {settings.body_timeout:g} s", code="request_timeout"
        ) from None
    return bytes(data)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    record(request).refuse(error)
    return JSONResponse(error.body(), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 405:
        message = f"{path[:100]} does not take {request.method}"
    elif error.status_code == 404:
        message = f"there is nothing at {path[:100]!r}; /openapi.json lists what is there"
    else:
        message = error.detail
    made = ApiError(error.status_code, message, headers=error.headers)
    record(request).refuse(made)
    return JSONResponse(made.body(), made.status, made.headers)
