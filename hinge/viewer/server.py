"""The server of the viewer on 127.0.0.1; it serves the paths of the viewer only.

Tornado, because it limits the time in which a request must arrive: connections that send nothing, or a byte now and
then, are closed. Files are read in threads, and all connections wait in one.
"""

import asyncio
import contextlib
import json
import logging
import threading
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import PurePosixPath
from typing import Any, Self

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from hinge.utils.errors import ConfigError, HingeError
from hinge.viewer.files import CONTENT_TYPES, Viewer

logger = logging.getLogger(__name__)

SECONDS = 10.0
"""In which the headers of a request must arrive, also those of the next one of a connection."""

_WAITING = 512  # connections that the system keeps until they are accepted
_MOST_BYTES = 64 << 10  # of the headers of a request, which has no body; regions of 100,000 spots fit
_THREADS = 4

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class ViewerServer:
    """Serve a viewer on 127.0.0.1; a context manager that closes the port.

    Parameters
    ----------
    viewer
        The viewer.
    port
        Port; 0 for any free one.

    Raises
    ------
    ConfigError
        The port is in use or not permitted.
    """

    def __init__(self, viewer: Viewer, port: int = 0):
        self.viewer = viewer
        try:
            self._sockets = bind_sockets(port, "127.0.0.1", backlog=_WAITING)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"port {port} cannot be used: {reason}; leave --port out for a free one") from error
        self.server_address: tuple[str, int] = self._sockets[0].getsockname()
        self.server_port = self.server_address[1]
        self.pool = ThreadPoolExecutor(_THREADS)
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._stopping, self._ended = threading.Event(), threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        for socket in self._sockets:
            socket.close()
        self.pool.shutdown(wait=False, cancel_futures=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def serve_forever(self) -> None:
        """Answer requests until `shutdown` is called in another thread."""
        try:
            asyncio.run(self._serve())
        finally:
            self._ended.set()

    async def _serve(self) -> None:
        application = Application([(".*", _Handler, {"server": self})], log_function=_log)
        server = HTTPServer(
            application,
            idle_connection_timeout=SECONDS,
            body_timeout=SECONDS,
            max_header_size=_MOST_BYTES,
            max_body_size=_MOST_BYTES,
        )
        stopped = asyncio.Event()
        self._running = asyncio.get_running_loop(), stopped
        server.add_sockets(self._sockets)
        try:
            if not self._stopping.is_set():
                await stopped.wait()
        finally:
            server.stop()
            await server.close_all_connections()

    def shutdown(self) -> None:
        """End `serve_forever`, and wait until it has ended."""
        self._stopping.set()
        if self._running is not None:
            loop, stopped = self._running
            loop.call_soon_threadsafe(stopped.set)
            self._ended.wait()


def _log(handler: RequestHandler) -> None:
    logger.debug("%s %s %s", handler.get_status(), handler.request.method, handler.request.uri)


class _Handler(RequestHandler):
    SUPPORTED_METHODS = ("GET", "HEAD")  # type: ignore[assignment]

    def initialize(self, server: ViewerServer) -> None:
        self.server = server

    def set_default_headers(self) -> None:
        self.set_header("Server", "hinge")
        for name, value in _HEADERS.items():
            self.set_header(name, value)

    def compute_etag(self) -> None:
        return None

    async def get(self) -> None:
        # DNS rebinding: the page of another site must not read a patient's slide
        port = self.server.server_port
        if self.request.headers.get("Host", "").lower() not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, b"this server answers to 127.0.0.1 only\n", ".txt")
            return
        path = self.request.path.removeprefix("/") or "index.html"
        try:
            query = {key: values[-1].decode("utf-8", "replace") for key, values in self.request.query_arguments.items()}
            loop = asyncio.get_running_loop()
            content = await loop.run_in_executor(self.server.pool, self.server.viewer.read, path, query)
        except HingeError as error:
            content = json.dumps({"error": str(error)}).encode()
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, content, ".json")
            return
        if content is None:
            self._answer(HTTPStatus.NOT_FOUND, b"not found\n", ".txt")
        else:
            self._answer(HTTPStatus.OK, content, PurePosixPath(path).suffix)

    head = get

    def write_error(self, status_code: int, **details: Any) -> None:
        self._answer(status_code, f"{HTTPStatus(status_code).phrase}\n".encode(), ".txt")

    def _answer(self, status: int, content: bytes, suffix: str) -> None:
        self.set_status(status)
        self.set_header("Content-Type", CONTENT_TYPES[suffix])
        self.set_header("Content-Length", str(len(content)))
        tile = suffix == ".jpeg" and status == HTTPStatus.OK
        self.set_header("Cache-Control", "private, max-age=3600" if tile else "no-store")
        self.finish(content)


def serve(viewer: Viewer, port: int = 0, browser: bool = True) -> None:
    """Serve a viewer until Ctrl-C, and open it in the browser.

    Parameters
    ----------
    viewer
        The viewer.
    port
        Port on 127.0.0.1; 0 for any free one.
    browser
        Whether to open the page.
    """
    with ViewerServer(viewer, port) as server:
        print(f"viewer: {server.url} (Ctrl-C ends it)", flush=True)
        if browser:
            webbrowser.open(server.url)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
