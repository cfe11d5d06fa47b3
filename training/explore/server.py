"""The web server of the page: files of its own, what there is to choose from, and images as they are asked for.

It listens on 127.0.0.1 alone. Pages of other servers cannot use it either: what they ask for in the reader's browser
has another Origin, a form cannot send JSON, and a name of theirs that leads here (DNS rebinding) is no Host of ours.
"""

import contextlib
import errno
import json
import signal
from concurrent.futures import CancelledError, wait
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dnnlib.errors import UserError
from training.config.explore import PageRequest
from training.explore.jobs import SupersededError
from training.explore.session import Session

ADDRESS = "127.0.0.1"
HOSTS = (ADDRESS, "localhost")
FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/pane.js": ("pane.js", "text/javascript; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
LARGEST = 1 << 16  # bytes of a request
INTERVAL = 0.1  # seconds between lines that say how far a job is
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class RefusedError(Exception):
    """A request that is not answered."""

    def __init__(self, status: HTTPStatus, reason: str):
        super().__init__(reason)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: "PageServer"
    server_version, sys_version = "OpenEDM2", ""
    timeout = 60  # seconds that a request may take to arrive

    def do_GET(self) -> None:
        self._answer(self._get)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, method: Any) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            try:
                self._check_sender()
                method()
            except RefusedError as err:
                self._send(err.status, "text/plain; charset=utf-8", f"{err}\n".encode())

    def _check_sender(self) -> None:
        """Refuse what does not come from our own page."""
        host = self.headers.get("Host", "")
        if host.rpartition(":")[0] not in HOSTS and host not in HOSTS:
            raise RefusedError(HTTPStatus.FORBIDDEN, f"this server is {self.server.url}, and nothing else")
        if self.headers.get("Origin", f"http://{host}") != f"http://{host}":
            raise RefusedError(HTTPStatus.FORBIDDEN, "this server answers its own page alone")

    def _get(self) -> None:
        path = urlsplit(self.path).path
        if path == "/api/networks":
            self._send(HTTPStatus.OK, "application/json", json.dumps(self.server.session.describe()).encode())
        elif path in FILES:
            name, kind = FILES[path]
            self._send(HTTPStatus.OK, kind, Path(__file__).with_name(name).read_bytes())
        else:
            raise RefusedError(HTTPStatus.NOT_FOUND, f"there is only the page at {self.server.url}")

    def _post(self) -> None:
        """Images: a stream of JSON lines, of which the last is the result, and those before say how far it is."""
        if self.path != "/api/images":
            raise RefusedError(HTTPStatus.NOT_FOUND, f"there is only the page at {self.server.url}")
        request = self._request()
        self._begin(HTTPStatus.OK, "application/x-ndjson")
        job = self.server.session.submit(request)
        try:
            while not job.future.done():
                wait([job.future], INTERVAL)
                if not job.future.done():
                    self._line({"progress": job.progress})
            try:
                self._line(job.future.result())
            except (SupersededError, CancelledError):  # the latter when the session ends
                self._line({"superseded": True})
        except (ConnectionError, TimeoutError):  # the page has gone
            job.cancel()
            raise

    def _request(self) -> PageRequest:
        if self.headers.get_content_type() != "application/json":
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST:
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"send at most {LARGEST} bytes, and say how many")
        try:
            return PageRequest.from_json(json.loads(self.rfile.read(int(length))))
        except (ValueError, RecursionError) as err:  # a UserError is one
            raise RefusedError(HTTPStatus.BAD_REQUEST, str(err) if isinstance(err, UserError) else "no JSON") from None

    def _line(self, values: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(values).encode() + b"\n")
        self.wfile.flush()

    def _begin(self, status: HTTPStatus, kind: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **HEADERS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, status: HTTPStatus, kind: str, data: bytes) -> None:
        self._begin(status, kind, **{"Content-Length": str(len(data))})
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of requests."""


class PageServer(ThreadingHTTPServer):
    """Serves the page of a session.

    Args:
        port: 0 = any that is free.

    Raises:
        UserError: the port is taken, or not for users.
    """

    daemon_threads = True

    def __init__(self, session: Session, port: int):
        self.session = session
        try:
            super().__init__((ADDRESS, port), Handler)
        except OSError as err:
            reason = "is in use" if err.errno == errno.EADDRINUSE else f"cannot be used ({err.strerror})"
            raise UserError(f"--port={port}: {reason}: choose another one, or 0 for any that is free") from None

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}"


def serve(session: Session, port: int) -> None:
    """Serve the page until Ctrl-C, or until the process is asked to end, as when its terminal is closed.

    Raises:
        UserError: see `PageServer`.
    """
    # Averages take disk space, and are to be deleted by whoever made their folder, however this ends.
    for name in ("SIGTERM", "SIGHUP"):  # the latter not on Windows
        asked = getattr(signal, name, None)
        if asked is not None and signal.getsignal(asked) is signal.SIG_DFL:  # nohup ignores it
            signal.signal(asked, signal.default_int_handler)
    with contextlib.closing(session), PageServer(session, port) as server, contextlib.suppress(KeyboardInterrupt):
        print(f"Open {server.url} in a browser. Ctrl-C ends.", flush=True)
        server.serve_forever()
