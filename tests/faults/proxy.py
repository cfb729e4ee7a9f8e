"""An HTTP proxy in front of a real store that loses, refuses and delays what it is told to."""

from __future__ import annotations

import http.client
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Action = Literal["lose_reply", "drop", "status", "forget_condition"]


@dataclass
class Rule:
    """Hits the next `times` requests of `method` whose path matches; `fired` counts them."""

    method: str
    path: str
    action: Action
    times: int = 1
    code: int = 503
    error: str = "SlowDown"
    fired: int = 0


@dataclass
class Faults:
    """A running proxy. `rules` may change at any time; `seen` is every request's method and path."""

    target: str
    rules: list[Rule] = field(default_factory=list)
    seen: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        faults = self
        self._lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                rule = faults._match(self.command, self.path)
                if rule and rule.action == "drop":
                    self.connection.close()
                    self.close_connection = True
                    return
                if rule and rule.action == "status":
                    text = f"<?xml version='1.0'?><Error><Code>{rule.error}</Code><Message>injected</Message></Error>"
                    self._answer(rule.code, {"Content-Type": "application/xml"}, text.encode())
                    return
                if rule and rule.action == "forget_condition":
                    # As rclone's and Swift's S3 fronts do: the header is taken and means nothing.
                    del self.headers["If-None-Match"]
                upstream = http.client.HTTPConnection(urlsplit(faults.target).netloc, timeout=30)
                upstream.request(self.command, self.path, body, dict(self.headers))
                reply = upstream.getresponse()
                data = reply.read()
                headers = {k: v for k, v in reply.getheaders() if k.lower() not in ("connection", "transfer-encoding")}
                upstream.close()
                if rule and rule.action == "lose_reply":
                    # The store has applied the request; the client will never know.
                    self.connection.close()
                    self.close_connection = True
                    return
                self._answer(reply.status, headers, data)

            def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() != "content-length" or self.command == "HEAD":
                        self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _match(self, method: str, path: str) -> Rule | None:
        with self._lock:
            self.seen.append((method, path))
            for rule in self.rules:
                if rule.times > rule.fired and rule.method == method and re.search(rule.path, path):
                    rule.fired += 1
                    return rule
        return None

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
