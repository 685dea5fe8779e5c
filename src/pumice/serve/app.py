"""The ASGI application: routes, request bodies and the order of the middleware."""

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
from pumice.serve.observe import Observe, request_record
from pumice.serve.openapi import document
from pumice.serve.page import files, send
from pumice.serve.settings import ServerSettings


def build(settings: ServerSettings, backend: Backend, metrics: Metrics, gate: Gate) -> Starlette:
    """Return the ASGI application of one worker."""
    started = int(time.time())
    metrics.stats = backend.stats
    openapi_document = document(__version__)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await backend.start(metrics)
        refresher = asyncio.create_task(_refresh_every_second(metrics)) if metrics.shared else None
        try:
            yield
        finally:
            if refresher is not None:
                refresher.cancel()
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
        names = await backend.models()
        if name not in names:
            raise ApiError(404, f"there is no model {name!r} here", param="model", code="model_not_found")
        return JSONResponse(card(name))

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "pumice"}

    async def health(_: Request) -> Response:
        ready = not gate.draining and await backend.ready()
        values = {
            "status": "draining" if gate.draining else "ok" if ready else "away",
            "version": __version__,
        }
        return JSONResponse(values, 200 if ready else 503, {"Cache-Control": "no-store"})

    async def prometheus(_: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    async def openapi(_: Request) -> Response:
        return JSONResponse(openapi_document)

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
    middleware = [Middleware(Observe, metrics=metrics, paths=paths)]
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


async def _refresh_every_second(metrics: Metrics) -> None:
    while True:
        metrics.refresh()
        await asyncio.sleep(1)


async def _body(request: Request, settings: ServerSettings) -> bytes:
    """Return the body of a request. Raises ApiError when it is too large or arrives too slowly."""
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
    request_record(request).add_error(error)
    return JSONResponse(error.body(), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 405:
        message = f"{path[:100]} does not accept {request.method}; /openapi.json lists the methods"
    elif error.status_code == 404:
        message = f"there is nothing at {path[:100]!r}; /openapi.json lists what is there"
    else:
        message = error.detail
    api_error = ApiError(error.status_code, message, headers=error.headers)
    request_record(request).add_error(api_error)
    return JSONResponse(api_error.body(), api_error.status, api_error.headers)
