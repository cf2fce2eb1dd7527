"""A proxy before an S3 server that goes wrong on purpose: by chance from a seed, or as a test says.

refuse      the connection is closed before the server has heard of the request
lose        the server does what was asked, and its answer is lost
truncate    the body of the answer breaks off in the middle, and so does the connection
delay       the answer comes late
500         InternalError, and the server has not heard of the request
landed 500  InternalError, though the server did what was asked
503         SlowDown

It can also stand for a server that takes conditional puts and pays no heed to their condition.
"""

from __future__ import annotations

import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from s3_server import ACCESS_KEY, REGION, SECRET_KEY, S3Server

KINDS = ("refuse", "lose", "truncate", "delay", "500", "landed 500", "503")
MAX_DELAY_SECONDS = 1.0
_PER_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length"}
_ERRORS = {"500": ("InternalError", "We encountered an internal error."), "503": ("SlowDown", "Reduce your rate.")}

# (method, path with query) -> a kind, or None for a request that goes well
Plan = Callable[[str, str], str | None]


class FaultyProxy:
    """Where the proxy is, what it does next, and what it has done."""

    def __init__(self, endpoint: str, plan: Plan, make_way: Callable[[str], None] | None = None) -> None:
        """make_way: called with the path of what is put only if it is absent, before that."""
        self.endpoint = endpoint
        self.plan = plan
        self.make_way = make_way
        self.injected: Counter[str] = Counter()
        self.requests = 0
        self._lock = threading.Lock()

    @property
    def server(self) -> S3Server:
        """The S3 server as it is seen through the proxy."""
        return S3Server(self.endpoint)

    def next_fault(self, method: str, path: str) -> str | None:
        with self._lock:
            self.requests += 1
            kind = self.plan(method, path)
            if kind:
                self.injected[kind] += 1
            return kind


def by_chance(seed: int, share: float, kinds: Sequence[str] = KINDS) -> Plan:
    """A plan in which this share of the requests goes wrong, each in one of `kinds`."""
    generator = random.Random(seed)
    return lambda method, path: generator.choice(kinds) if generator.random() < share else None


def nothing_wrong(method: str, path: str) -> None:
    """The plan of an honest proxy."""


@contextmanager
def faulty_proxy(
    server: S3Server, plan: Plan = nothing_wrong, *, ignores_conditions: bool = False
) -> Iterator[FaultyProxy]:
    """Run a proxy before `server`. The client's Host goes on unchanged, since signatures cover it, and so do headers:
    a condition is ignored by removing what stands in its way."""
    listener = _Listener(("127.0.0.1", 0), _Handler)
    listener.upstream = urlsplit(server.endpoint).netloc
    endpoint = f"http://127.0.0.1:{listener.server_address[1]}"
    listener.proxy = FaultyProxy(endpoint, plan, _remover(server) if ignores_conditions else None)
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield listener.proxy
    finally:
        listener.shutdown()
        listener.server_close()


def _remover(server: S3Server) -> Callable[[str], None]:
    """Removes the object at a path such as /bucket/key."""
    from botocore.session import get_session

    client = get_session().create_client(
        "s3",
        endpoint_url=server.endpoint,
        region_name=REGION,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
    )

    def remove(path: str) -> None:
        bucket, _, key = unquote(urlsplit(path).path).lstrip("/").partition("/")
        client.delete_object(Bucket=bucket, Key=key)

    return remove


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # clients keep connections open
    request_queue_size = 128
    upstream: str
    proxy: FaultyProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no event."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener
    timeout = 60
    disable_nagle_algorithm = True

    def _handle(self) -> None:
        body = self._read_body()
        if self.server.proxy.make_way and self.headers.get("If-None-Match"):
            self.server.proxy.make_way(self.path)
        kind = self.server.proxy.next_fault(self.command, self.path)
        if kind in ("500", "503"):
            self._answer_error(kind)
            return
        if kind == "refuse":
            self._break_off()
            return
        if kind == "delay":
            time.sleep(random.uniform(0.05, MAX_DELAY_SECONDS))
        status, reason, headers, content = self._ask(body)
        if kind == "landed 500":
            self._answer_error("500")
        elif kind == "lose" or (kind == "truncate" and len(content) < 2):
            self._break_off()
        else:
            self._answer(status, reason, headers, content, cut=kind == "truncate")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(pieces)

    def _ask(self, body: bytes) -> tuple[int, str, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _PER_HOP:
                    connection.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            content = response.read()
            return response.status, response.reason, response.getheaders(), content
        finally:
            connection.close()

    def _answer(self, status: int, reason: str, headers: list[tuple[str, str]], content: bytes, *, cut: bool) -> None:
        self.send_response_only(status, reason)
        length = str(len(content))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value  # GET would bring this much
            elif name.lower() not in _PER_HOP:
                self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self._break_off()

    def _answer_error(self, kind: str) -> None:
        code, message = _ERRORS[kind]
        content = (
            f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
        )
        headers = [("Content-Type", "application/xml")]
        self._answer(int(kind), code, headers, b"" if self.command == "HEAD" else content.encode(), cut=False)

    def _break_off(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        pass
