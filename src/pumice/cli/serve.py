"""`pumice serve`: run the HTTP server and its chat page."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pumice.cli import options
from pumice.errors import InputError, WorkError, install
from pumice.serve.settings import KEYS, ServerSettings


@options.expand
def serve(
    model: options.Model = "pumice-tiny",
    *,
    settings: ServerSettings,
    opening: Annotated[options.Opening, "device", "quantize", "mmproj", "cache_limit"],
) -> None:
    """Serve a model over HTTP: OpenAI's protocol at /v1, a page to chat on at /.

    pumice serve --model pumice-tiny --port 8000
    """
    try:
        from pumice.serve.logs import configure_logging
        from pumice.serve.run import bind, make_server
    except ImportError as error:
        raise InputError(f"serving needs {error.name}: {install('serve')}") from error
    from pumice.formats.read import is_built_in

    settings = replace(settings, api_key=_read_keys(settings), api_key_file=None).check()
    if not settings.loopback and not settings.api_key:
        print(f"pumice: {settings.host} is open to others and no API key is set", file=sys.stderr)
    with bind(settings) as listener:  # a taken port fails before the model is loaded
        configure_logging(settings.log, settings.log_level)
        options.share_cores(waits_for_people=True)
        assistant = opening.load(
            model,
            slots=settings.slots,
            cache_tokens=settings.cache_tokens,
            chunk=settings.chunk,
            memory_share=0.5,  # of what is free beside the weights: the rest is for requests and pictures
        )
        name = assistant.name if assistant.name != model else Path(model).resolve().name
        server = make_server(assistant, settings.name or (name,), settings, is_built_in=is_built_in(model))
        server.run(sockets=[listener])
    if not server.started:
        raise WorkError("the server did not start; its log says why")


def _read_keys(settings: ServerSettings) -> tuple[str, ...]:
    """Return the keys of the options, the environment and the file. Raises InputError for an empty one."""
    # An empty key, such as that of an unset shell variable, must not leave the server open to everybody.
    if any(not key.strip() for key in settings.api_key):
        raise InputError("--api-key is empty; give a key, or leave the option out to serve without one")
    env_keys = os.environ.get(KEYS)
    if env_keys is not None and not env_keys.strip(", "):
        raise InputError(f"{KEYS} is empty; give it a key, or unset it to serve without one")
    keys = [*settings.api_key, *(env_keys or "").split(",")]
    if (file := settings.api_key_file) is not None:
        try:
            keys += file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the keys '{file}' cannot be read ({error}); check the path") from error
        if not any(key.strip() for key in keys):
            raise InputError(f"'{file}' holds no key; write one per line")
    return tuple(dict.fromkeys(key.strip() for key in keys if key.strip()))
