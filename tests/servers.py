"""A local web server that behaves as badly as real ones."""

import contextlib
import gzip
import hashlib
import http.server
import random
import threading
import time
from collections.abc import Callable

import pytest

DATA = bytes(range(256)) * 4096  # 1 MiB


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        requests = self.server.requests
        requests.append((self.path, self.headers.get("Range")))
        script = self.server.script.get(self.path.partition("?")[0], [])
        count = sum(path == self.path for path, _ in requests)
        behave = script[min(count, len(script)) - 1] if script else serve()
        behave(self)

    def log_message(self, *args):
        pass


def headers(handler: Handler, code: int, fields: dict) -> None:
    handler.send_response(code)
    for key, value in fields.items():
        handler.send_header(key, str(value))
    handler.end_headers()


def serve(
    data: bytes = DATA,
    version: dict | None = None,
    ranges: bool = True,
    stop_after: int | None = None,
    stall: bool = False,
    delay: float = 0,
    claim: int | None = None,
) -> Callable:
    """A good answer, or one that ends (or stalls) after `stop_after` bytes."""
    version = {"ETag": '"v1"'} if version is None else version

    def behave(handler: Handler) -> None:
        start = 0
        condition = handler.headers.get("If-Range")
        if ranges and handler.headers.get("Range") and condition in version.values():
            start = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            fields = {
                "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}",
                "Content-Length": len(data) - start,
            }
            headers(handler, 206, {**fields, **version})
        else:
            headers(handler, 200, {"Content-Length": len(data) if claim is None else claim, **version})
        end = len(data) if stop_after is None else min(start + stop_after, len(data))
        time.sleep(delay)
        handler.wfile.write(data[start:end])
        if stall:
            handler.wfile.flush()
            time.sleep(2)
        if end < len(data) or claim is not None:
            handler.close_connection = True

    return behave


def status(code: int, **fields) -> Callable:
    return lambda handler: headers(handler, code, {"Content-Length": 0, **fields})


def partial(data: bytes = DATA, start: int = 0, end: int | None = None, total: object = None, **fields) -> Callable:
    """Part of a file, whatever was asked for."""

    def behave(handler: Handler) -> None:
        begin = max(start, int((handler.headers.get("Range") or "bytes=0-")[6:-1]))
        stop = len(data) if end is None else min(begin + end, len(data))
        span = f"bytes {begin}-{stop - 1}/{len(data) if total is None else total}"
        headers(handler, 206, {"Content-Range": span, "Content-Length": stop - begin, "ETag": '"v1"', **fields})
        handler.wfile.write(data[begin:stop])

    return behave


PACKED = gzip.compress(random.Random(0).randbytes(1 << 20))


def packed(stop_after: int | None = None) -> Callable:
    data = PACKED

    def behave(handler: Handler) -> None:
        headers(handler, 200, {"Content-Encoding": "gzip", "Content-Length": len(data), "ETag": '"v1"'})
        handler.wfile.write(data[:stop_after])
        handler.close_connection = stop_after is not None

    return behave


def endless(data: bytes = DATA, pause: float = 0, length: int | None = None) -> Callable:
    """The same piece again and again; in chunks, or as a file of some length."""

    def behave(handler: Handler) -> None:
        fields = {"Transfer-Encoding": "chunked"} if length is None else {"Content-Length": length, "ETag": '"v1"'}
        headers(handler, 200, fields)
        with contextlib.suppress(OSError):  # the other end hangs up
            while True:
                handler.wfile.write(data if length is not None else f"{len(data):x}\r\n".encode() + data + b"\r\n")
                handler.wfile.flush()
                time.sleep(pause)
        handler.close_connection = True

    return behave


def hub_file(data: bytes) -> Callable:
    def behave(handler: Handler) -> None:
        fields = {
            "X-Repo-Commit": "0" * 40,
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "Content-Length": len(data),
        }
        headers(handler, 200, fields)
        if handler.command == "GET":
            handler.wfile.write(data)

    return behave


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.requests = []
    server.script = {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
