"""An HTTP proxy in front of a real store that loses, refuses, cuts and delays what it is told to."""

from __future__ import annotations

import http.client
import random
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import BinaryIO, Literal
from urllib.parse import urlsplit

Action = Literal[
    "drop",  # before the store sees it
    "lose_reply",  # after the store has done it
    "cut_request",  # the store gets half of the body
    "cut_reply",  # the client gets half of the body
    "status",  # an error of S3's, the store sees nothing
    "forget_condition",
    "delay",
    "throttle",
]
ALWAYS = 1_000_000_000
CHUNK = 16 << 10


@dataclass
class Rule:
    """Hits the next `times` requests whose method and path match and that have `header`; `fired` counts them.

    `method` is a regular expression of the whole method, `path` one that is searched in path and query. With `share`
    below 1 it hits that share of them, drawn by the proxy's seed; the shares of rules that match the same add up.
    """

    method: str
    path: str
    action: Action
    times: int = 1
    code: int = 503
    error: str = "SlowDown"
    header: str = ""
    share: float = 1.0
    seconds: float = 0.0
    bytes_per_s: float = 0.0
    fired: int = 0


def storm(share: float) -> list[Rule]:
    """Rules by which `share` of all requests fail: 500, SlowDown, lost replies, cut ones and dropped requests.

    A put with a condition fails a fifth more often, as it may also be answered 409.
    """

    def rule(action: Action, code: int = 0, error: str = "", method: str = ".*", header: str = "") -> Rule:
        return Rule(method, "", action, ALWAYS, code, error, header, share / 5)

    return [
        rule("status", 409, "ConditionalRequestConflict", "PUT", "If-None-Match"),
        rule("status", 503, "SlowDown"),
        rule("lose_reply"),
        rule("drop"),
        rule("cut_reply"),
        rule("status", 500, "InternalError"),
    ]


@dataclass
class Faults:
    """A running proxy. `rules` may change at any time; `seen` is every request's method and path."""

    target: str
    rules: list[Rule] = field(default_factory=list)
    seen: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        faults = self
        self._lock = threading.Lock()
        self._random = random.Random(self.seed)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                rule = faults._match(self.command, self.path, self.headers)
                action = rule.action if rule else None
                rate = rule.bytes_per_s if rule and action == "throttle" else 0.0
                length = int(self.headers.get("Content-Length") or 0)
                body = _read(self.rfile, length // 2 if action == "cut_request" else length, rate)
                if action == "delay" and rule:
                    time.sleep(rule.seconds)
                if action == "drop":
                    return self._hang_up()
                if action == "status" and rule:
                    text = f"<?xml version='1.0'?><Error><Code>{rule.error}</Code><Message>injected</Message></Error>"
                    return self._answer(rule.code, {"Content-Type": "application/xml"}, text.encode())
                if action == "forget_condition":
                    # As rclone's S3 front does: the header is taken and means nothing.
                    del self.headers["If-None-Match"]
                del self.headers["Expect"]
                try:
                    upstream = http.client.HTTPConnection(urlsplit(faults.target).netloc, timeout=60)
                    upstream.request(self.command, self.path, body, dict(self.headers))
                    if action == "cut_request":
                        upstream.close()
                        return self._hang_up()
                    reply = upstream.getresponse()
                    data = reply.read()
                    upstream.close()
                except (OSError, http.client.HTTPException):
                    return self._hang_up()
                if action == "lose_reply":
                    return self._hang_up()
                headers = {k: v for k, v in reply.getheaders() if k.lower() not in ("connection", "transfer-encoding")}
                self._answer(reply.status, headers, data, action == "cut_reply", rate)

            def _hang_up(self) -> None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            def _answer(
                self, status: int, headers: dict[str, str], data: bytes, cut: bool = False, rate: float = 0.0
            ) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() != "content-length" or self.command == "HEAD":
                        self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(data)))
                if cut and not data:
                    return self._hang_up()
                self.end_headers()
                if self.command == "HEAD":
                    return
                for start in range(0, len(data) // 2 if cut else len(data), CHUNK):
                    piece = data[start : start + CHUNK][: len(data) // 2 - start if cut else None]
                    self.wfile.write(piece)
                    if rate:
                        time.sleep(len(piece) / rate)
                if cut:
                    self._hang_up()

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 256

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # A client that hung up, as it may.

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def _match(self, method: str, path: str, headers: http.client.HTTPMessage) -> Rule | None:
        with self._lock:
            self.seen.append((method, path))
            left = self._random.random()
            for rule in self.rules:
                if rule.fired >= rule.times or (rule.header and rule.header not in headers):
                    continue
                if re.fullmatch(rule.method, method) and re.search(rule.path, path):
                    left -= rule.share
                    if left < 0:
                        rule.fired += 1
                        return rule
        return None

    def __enter__(self) -> Faults:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _read(file: BinaryIO, length: int, rate: float) -> bytes:
    """`length` bytes, taken so slowly."""
    pieces: list[bytes] = []
    while length and (piece := file.read(min(length, CHUNK))):
        pieces.append(piece)
        length -= len(piece)
        if rate:
            time.sleep(len(piece) / rate)
    return b"".join(pieces)
