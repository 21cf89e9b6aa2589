"""An HTTP server that answers as the test says and keeps what it was asked, for what a real one would not say."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, str, bytes]  # status, content type, body


def as_json(value: object, status: int = 200) -> Answer:
    return status, "application/json", json.dumps(value).encode()


@dataclass(frozen=True)
class Request:
    line: str  # method, path and query
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def form(self) -> dict[str, str]:
        """Of multipart/form-data; a file's text under its field's name."""
        head = f"Content-Type: {self.headers['content-type']}\r\n\r\n".encode()
        parts = BytesParser().parsebytes(head + self.body).get_payload()
        return {
            str(part.get_param("name", header="content-disposition")): part.get_payload(decode=True).decode()  # type: ignore[union-attr]
            for part in parts
        }


@dataclass
class Double:
    answer: Callable[[Request], Answer] = lambda request: as_json({})
    stream: Callable[[BaseHTTPRequestHandler, threading.Event], None] | None = None  # of GET events/
    asked: list[Request] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)
    port: int = 0


@contextmanager
def answering() -> Iterator[Double]:
    double = Double()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            size = int(self.headers.get("content-length") or 0)
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(f"{self.command} {self.path}", headers, self.rfile.read(size))
            double.asked.append(request)
            if self.path.startswith("/api/v1/events/") and double.stream:
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                double.stream(self, double.stopping)
                return
            status, kind, body = double.answer(request)
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_PATCH = handle_any

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        double.port = httpd.server_address[1]
        serving = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
        serving.start()
        try:
            yield double
        finally:
            double.stopping.set()
            httpd.shutdown()
            serving.join()
