"""Log lines: JSON objects for programs, or plain text for a terminal."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from pumice.jsonl import json_text

LOG = logging.getLogger("pumice.serve")


def configure_logging(form: str, level: str = "info") -> None:
    """Write all log records, those of uvicorn included, to stderr. form: json, text or auto."""
    if form == "auto":
        form = "text" if sys.stderr.isatty() else "json"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"  # `observe` logs the requests
    for name in ("uvicorn.error", "httpx", "httpcore", "asyncio"):
        logging.getLogger(name).setLevel("WARNING")


def request_line(
    level: int, message: str, fields: dict[str, Any], error: BaseException | None = None
) -> None:
    """Log a message with named fields, and with a stack trace if there is an error."""
    LOG.log(level, message, extra={"fields": fields}, exc_info=error)


class JsonFormatter(logging.Formatter):
    """One JSON object per line. Times are UTC."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json_text(line, sys.stderr.encoding, default=str)


class TextFormatter(logging.Formatter):
    """A time, the message and `name=value` pairs. Times are local."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {}).items()
        return " ".join([super().formatMessage(record), *(f"{key}={value}" for key, value in fields)])
