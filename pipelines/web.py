"""Fetch an image that a table names by http or https, and nothing else that this machine can reach.

A table may come from anybody. So: only hosts that the job names; the name is resolved once, every address that it has
must be a public one, and the connection goes to that address whatever the name means a moment later; each redirect is
checked as the first URL was; bytes and seconds are capped. (OWASP, Server-Side Request Forgery Prevention Cheat Sheet.)
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from urllib.parse import quote, urljoin, urlsplit

import stamina

from pipelines.errors import StorageError

ATTEMPTS = 5
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 20.0
DEADLINE_S = 60.0
MAX_REDIRECTS = 5
READ_BYTES = 1 << 16
PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_LATER = (408, 425, 429)
_TRANSLATED = [ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")]
"""Addresses of IPv6 that stand for one of IPv4, whichever it is."""


class Refused(ValueError):
    """A URL that is not asked for, by the job's own rules."""


class NotFetched(Exception):
    """A URL without an image; `kind` becomes the manifest's error_type."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _Later(Exception):
    """The server is there and does not give the image now."""


class _NoAnswer(Exception):
    """No server is there: that says nothing of one image."""


def permitted(url: str, allow_hosts: Sequence[str]) -> str:
    """The URL as it is asked for. Looks nothing up.

    Raises:
        Refused: it is no plain URL, or of a host that `allow_hosts` does not name.
    """
    if re.search(r"[\x00-\x20\x7f\\]", url):
        raise Refused("holds a space, a backslash or a control character; percent-encode it")
    try:
        parts = urlsplit(url)
        host, port = _host(url)
    except (ValueError, UnicodeError):
        raise Refused("is no URL") from None
    if parts.username is not None or parts.password is not None:
        raise Refused("names a user before its host; leave that out")
    if not any(_matches(entry.lower(), host, port, PORTS[parts.scheme]) for entry in allow_hosts):
        shown = _shown(host) if port == PORTS[parts.scheme] else f"{_shown(host)}:{port}"
        raise Refused(
            f"is on a web server, which is asked only where the job names it: source.allow_hosts: [{shown!r}]; or copy "
            "the images to a folder or a bucket"
        )
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = f"?{quote(parts.query, safe='/%:@!$&()*+,;=~-._?')}" if parts.query else ""
    netloc = _shown(host) if port == PORTS[parts.scheme] else f"{_shown(host)}:{port}"
    return f"{parts.scheme}://{netloc}{target}{query}"


def fetch_url(url: str, allow_hosts: Sequence[str], max_bytes: int) -> bytes:
    """The bytes behind a URL.

    Raises:
        NotFetched: it is refused, missing, too large or too slow, or its server goes on failing.
        StorageError: no server can be reached, after several tries; that is no fault of one row.
    """
    last, tries = "", 0
    try:
        for attempt in stamina.retry_context(
            on=(_Later, _NoAnswer), attempts=ATTEMPTS, timeout=DEADLINE_S, wait_initial=0.1, wait_max=10
        ):
            with attempt:
                tries = attempt.num
                return _follow(url, allow_hosts, max_bytes)
    except _Later as error:
        raise NotFetched("image.unavailable", f"{error}, {tries} times") from None
    except _NoAnswer as error:
        last = str(error)
    raise StorageError(f"{url}: not reached after {tries} tries ({last}); check the network, and source.allow_hosts")


def _follow(url: str, allow_hosts: Sequence[str], max_bytes: int) -> bytes:
    until = time.monotonic() + DEADLINE_S
    first = url
    for _ in range(MAX_REDIRECTS + 1):
        try:
            url = permitted(url, allow_hosts)
            addresses = _addresses(*_host(url))
        except Refused as error:
            raise NotFetched(
                "image.refused", str(error) if url == first else f"redirects to {url}, which {error}"
            ) from None
        found = _get(url, addresses, max_bytes, until)
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
        if urlsplit(url).scheme not in PORTS:
            raise NotFetched("image.refused", f"redirects to {url[:200]}, which is no web address")
    raise NotFetched("image.unavailable", f"more than {MAX_REDIRECTS} redirects")


def _host(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    if not host or parts.scheme not in PORTS:
        raise ValueError(url)
    if not _literal(host):
        host = host.encode("idna").decode("ascii").lower()
    return host, PORTS[parts.scheme] if parts.port is None else parts.port


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _matches(entry: str, host: str, port: int, usual: int) -> bool:
    name, colon, number = (
        entry.rpartition(":") if re.search(r":\d+$", entry) and not entry.endswith("]") else (entry, "", "")
    )
    if (int(number) if colon else usual) != port:
        return False
    if name.startswith("*."):
        # An address has no subdomains.
        return not _literal(host) and host.endswith(name[1:])
    return host == name.strip("[]")


def _addresses(host: str, port: int) -> list[str]:
    """Every address of a host, all of them public, or the one that the job itself names."""
    if _literal(host):
        return [host]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno == socket.EAI_NONAME:
            raise NotFetched("image.unavailable", f"no such host {host}") from None
        raise _NoAnswer(f"{host} cannot be looked up: {error.strerror}") from None
    except (OSError, UnicodeError) as error:
        raise _NoAnswer(f"{host} cannot be looked up: {error}") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in addresses:
        if not _is_public(address):
            raise Refused(
                f"is at {address}, which is no public address; to allow it, give {address} itself as the host"
            )
    return addresses


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif any(ip in net for net in _TRANSLATED):
            return False
    return ip.is_global and not ip.is_multicast


def _get(url: str, addresses: Sequence[str], max_bytes: int, until: float) -> bytes | str:
    """The body, or where a redirect leads to."""
    parts = urlsplit(url)
    host, port = _host(url)
    plain = _connect(addresses, port)
    late = threading.Event()

    def give_up() -> None:
        late.set()
        # What waits for the server, even in the middle of a line, wakes up.
        with contextlib.suppress(OSError):
            live[-1].shutdown(socket.SHUT_RDWR)

    live: list[socket.socket] = [plain]
    timer = threading.Timer(max(0.0, until - time.monotonic()), give_up)
    timer.start()
    try:
        if parts.scheme == "https":
            context = ssl.create_default_context()
            live.append(context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False))
        live[-1].settimeout(READ_TIMEOUT_S)
        if isinstance(live[-1], ssl.SSLSocket):
            live[-1].do_handshake()
        connection = http.client.HTTPConnection(host, port)
        connection.sock = live[-1]
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        headers = {"Host": parts.netloc, "User-Agent": "ldm-batch", "Accept": "image/*", "Accept-Encoding": "identity"}
        connection.request("GET", target, headers=headers)
        body = _read(connection.getresponse(), max_bytes)
        if late.is_set():
            raise OSError("cut off")
        return body
    except ssl.SSLCertVerificationError as error:
        raise NotFetched("image.refused", f"its certificate does not hold ({error.verify_message})") from None
    except (OSError, http.client.HTTPException) as error:
        if late.is_set():
            raise NotFetched("image.unavailable", f"took more than {DEADLINE_S:g} s") from None
        raise _Later(f"no whole answer ({str(error) or type(error).__name__})") from None
    finally:
        timer.cancel()
        for one in live:
            one.close()


def _connect(addresses: Sequence[str], port: int) -> socket.socket:
    problem: OSError | None = None
    for address in addresses:
        try:
            return socket.create_connection((address, port), CONNECT_TIMEOUT_S)
        except OSError as error:
            problem = error
    raise _NoAnswer(str(problem))


def _read(response: http.client.HTTPResponse, max_bytes: int) -> bytes | str:
    status = response.status
    if status in _REDIRECTS and (where := response.getheader("Location")):
        return where
    if status in (404, 410):
        raise NotFetched("image.missing", f"HTTP {status}")
    if status >= 500 or status in _LATER:
        raise _Later(f"HTTP {status}")
    if status != 200:
        raise NotFetched("image.refused", f"HTTP {status} {response.reason}"[:200])
    too_large = NotFetched("image.too_large", f"more than {max_bytes >> 20} MiB; make it smaller")
    if (response.length or 0) > max_bytes:
        raise too_large
    expected = response.length
    body = bytearray()
    while data := response.read1(READ_BYTES):
        body += data
        if len(body) > max_bytes:
            raise too_large
    if expected is not None and len(body) != expected:
        raise http.client.IncompleteRead(b"", expected - len(body))
    return bytes(body)
