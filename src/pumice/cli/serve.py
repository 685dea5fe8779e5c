"""`pumice serve`: run the HTTP server and its chat page."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pumice.cli import options
from pumice.errors import InputError, WorkError

KEYS = "PUMICE_API_KEY"  # environment variable: one key, or several separated by commas
SIZE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def serve(
    model: options.Model = "pumice-tiny",
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", help="0 takes a free one.")] = 8000,
    name: Annotated[
        list[str] | None,
        typer.Option(help="What clients call the model; repeat for further names.", show_default=False),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Requests answered at a time.")] = 16,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait beyond them.")] = 64,
    cache_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that the KV cache holds; about 1 GB.", show_default=False),
    ] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of prompts in one step.")] = 512,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A key that clients must send; repeat for more. Also ${KEYS}.", show_default=False
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with one key per line.", show_default=False)
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(help="An origin whose pages may ask, https://HOST or '*'; repeat.", show_default=False),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A further host name that a server on 127.0.0.1 answers to.", show_default=False),
    ] = None,
    allow_image_urls: Annotated[
        bool, typer.Option("--allow-image-urls", help="Fetch http(s) pictures from public addresses.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="The longest answer a request may ask for.")] = 2048,
    default_tokens: Annotated[
        int, typer.Option(help="The longest answer of a request that names no limit.")
    ] = 512,
    max_body: Annotated[str, typer.Option(help="Size of a request: bytes, or with K, M, G.")] = "20M",
    max_images: Annotated[int, typer.Option(help="Pictures in one request.")] = 16,
    max_pixels: Annotated[int, typer.Option(help="Pixels of one picture.")] = 50_000_000,
    max_connections: Annotated[int, typer.Option(help="Open connections.")] = 1024,
    timeout: Annotated[float, typer.Option(help="Seconds from a request to its answer's end.")] = 300.0,
    body_timeout: Annotated[float, typer.Option(help="Seconds for a request to arrive.")] = 30.0,
    image_timeout: Annotated[float, typer.Option(help="Seconds to fetch a picture.")] = 10.0,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds that answers in flight may take after SIGTERM.")
    ] = 60.0,
    log: Annotated[
        str, typer.Option(help="json, text, or auto: text on a terminal.", metavar="FORM")
    ] = "auto",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    device: options.Device = None,
    quantize: options.Quantize = options.Bits.auto,
) -> None:
    """Serve a model over HTTP: OpenAI's protocol at /v1, a page to chat on at /.

    pumice serve --model pumice-tiny --port 8000
    """
    try:
        from pumice.serve.logs import configure_logging
        from pumice.serve.run import bind, make_server
        from pumice.serve.settings import ServerSettings
    except ImportError as error:
        raise InputError(f"serving needs {error.name}; install it: pip install 'pumice[serve]'") from error

    settings = ServerSettings(
        host=host,
        port=port,
        keys=_read_keys(api_key, api_key_file),
        cors=tuple(cors or ()),
        hosts=tuple(name.lower() for name in allow_host or ()),
        max_body=_parse_size(max_body),
        max_images=max_images,
        max_pixels=max_pixels,
        max_tokens=max_tokens,
        default_tokens=min(default_tokens, max_tokens),
        queue=queue,
        max_connections=max_connections,
        timeout=timeout,
        body_timeout=body_timeout,
        drain_timeout=drain_timeout,
        allow_image_urls=allow_image_urls,
        image_timeout=image_timeout,
    ).check()
    form, level = _log_format(log, log_level)
    if not settings.loopback and not settings.keys:
        print(f"pumice: {host} is open to others and no API key is set", file=sys.stderr)
    with bind(settings) as listener:  # a taken port fails before the model is loaded
        configure_logging(form, level)
        options.share_cores(waits_for_people=True)
        from pumice.assistant import load

        names = tuple(name or (Path(model).name or model,))
        opening = options.opening(device, quantize)
        assistant = load(model, slots=slots, cache_tokens=cache_tokens, chunk=chunk, **opening)
        server = make_server(assistant, names, settings)
        server.run(sockets=[listener])
    if not server.started:
        raise WorkError("the server did not start; its log says why")


def _read_keys(options_keys: list[str] | None, file: Path | None) -> tuple[str, ...]:
    """Return the keys of the options, the environment and the file. Raises InputError for an empty one."""
    # An empty key, such as that of an unset shell variable, must not leave the server open to everybody.
    if any(not key.strip() for key in options_keys or ()):
        raise InputError("--api-key is empty; give a key, or leave the option out to serve without one")
    env_keys = os.environ.get(KEYS)
    if env_keys is not None and not env_keys.strip(", "):
        raise InputError(f"{KEYS} is empty; give it a key, or unset it to serve without one")
    keys = [*(options_keys or ()), *(env_keys or "").split(",")]
    if file is not None:
        try:
            keys += file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the keys '{file}' cannot be read ({error}); check the path") from error
        if not any(key.strip() for key in keys):
            raise InputError(f"'{file}' holds no key; write one per line")
    return tuple(dict.fromkeys(key.strip() for key in keys if key.strip()))


def _parse_size(text: str) -> int:
    """Return the bytes of a size such as "20M"."""
    match = re.fullmatch(r"(\d+)\s*([kmg]?)i?b?", text.strip().lower())
    if match is None:
        raise InputError(f"the size {text!r} is not valid; write for example 20M")
    return int(match[1]) * SIZE_UNITS[match[2]]


def _log_format(form: str, level: str) -> tuple[Literal["json", "text"], str]:
    if form not in ("auto", "json", "text"):
        raise InputError(f"--log is {form!r}; use json, text or auto")
    if level not in ("debug", "info", "warning", "error"):
        raise InputError(f"--log-level is {level!r}; use debug, info, warning or error")
    if form == "auto":
        form = "text" if sys.stderr.isatty() else "json"
    return ("json" if form == "json" else "text"), level
