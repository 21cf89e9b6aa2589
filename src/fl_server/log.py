"""Logging set-up. The ids of what is worked on travel in contextvars and stand in every line."""

from __future__ import annotations

import logging
from contextvars import ContextVar

session_id: ContextVar[str] = ContextVar("session_id", default="")
round_number: ContextVar[int] = ContextVar("round_number", default=0)
client_id: ContextVar[str] = ContextVar("client_id", default="")
task_id: ContextVar[str] = ContextVar("task_id", default="")

_ALWAYS = set(logging.LogRecord("", 0, "", 0, "", None, None).__dict__) | {"message", "asctime", "taskName"}


class FactsFormatter(logging.Formatter):
    """`time level logger event key=value …`: the constant event phrase, then its facts."""

    def format(self, record: logging.LogRecord) -> str:
        facts = {key: value for key, value in record.__dict__.items() if key not in _ALWAYS}
        for name, variable in (
            ("session", session_id),
            ("round", round_number),
            ("client", client_id),
            ("task", task_id),
        ):
            if (value := variable.get()) and name not in facts:
                facts[name] = value
        said = super().format(record)
        head, newline, traceback = said.partition("\n")
        return head + "".join(f" {key}={_plain(value)}" for key, value in facts.items()) + newline + traceback


def _plain(value: object) -> str:
    text = str(value)
    return text if text and not any(c.isspace() or c in '"=' for c in text) else repr(text)


def configure(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(FactsFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "grpc", "asyncio", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of each form that is none: anybody's
