"""The forms of a log line: LightLLM's text, the same for the systemd journal, and JSON.

A line may say more than its text. `extra={"fields": {...}}` adds fields to the JSON form; a field
`message` replaces the text there. Lines that are written while a request is handled have its id,
and the name of its API key, in every form. A prompt or a key is never a field.
"""

import datetime
import json
import logging
from contextvars import ContextVar

_PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}  # of syslog
FORMS = ("text", "journal", "json")
# Of the request that is being handled. Empty in processes that handle none by themselves.
request_fields: ContextVar[dict[str, str]] = ContextVar("request_fields", default={})  # noqa: B039


def make_formatter(process: str, form: str) -> logging.Formatter:
    """The formatter of one of `FORMS` for the process of this name."""
    if form == "json":
        return JsonFormatter(process)
    return _JournalFormatter(process) if form == "journal" else _TextFormatter(process)


class _TextFormatter(logging.Formatter):
    """LEVEL month-day time [process file:line] message"""

    def __init__(self, process: str, when: str = " %(asctime)s") -> None:
        form = f"%(levelname)s{when} [{process} %(filename)s:%(lineno)d] %(message)s"
        super().__init__(form, "%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - of the base
        """The line, with the fields of the request that its text does not have."""
        missing = [
            f" {name}={value}"
            for name, value in request_fields.get().items()
            if value not in record.message
        ]
        return super().formatMessage(record) + "".join(missing)


class _JournalFormatter(_TextFormatter):
    """Without the time, which the journal has, and with a priority before each line."""

    def __init__(self, process: str) -> None:
        super().__init__(process, when="")

    def format(self, record: logging.LogRecord) -> str:
        """The lines of a record."""
        prefix = f"<{_PRIORITIES.get(record.levelname, 6)}>"
        return prefix + super().format(record).replace("\n", "\n" + prefix)


class JsonFormatter(logging.Formatter):
    """One object on one line: time in UTC, level, process, source, message, and fields."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The object."""
        more: dict[str, object] = getattr(record, "fields", {})
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, object] = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "source": f"{record.filename}:{record.lineno}",
            "message": "" if "message" in more else record.getMessage(),
            **request_fields.get(),
            **more,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
