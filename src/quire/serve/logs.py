"""The log as JSON, one object a line, for machines that read it. Knows nothing of what is logged."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime


class JsonLines(logging.Formatter):
    """time, level, logger, message; `request` where a record carries one, `error` where it has an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        content = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request = getattr(record, "request", None)
        if request is not None:
            content["request"] = request
        if record.exc_info:
            content["error"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False, default=str)


def log_as_json(logger: logging.Logger) -> None:
    """Have all handlers of a logger write JSON."""
    for handler in logger.handlers:
        handler.setFormatter(JsonLines())
