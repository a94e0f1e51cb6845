"""The server of the viewer on 127.0.0.1; it serves the paths of the viewer only."""

import contextlib
import json
import logging
import sys
import webbrowser
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from hinge.utils.errors import ConfigError, HingeError
from hinge.viewer.content import CONTENT_TYPES, Viewer

logger = logging.getLogger(__name__)

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


class ViewerServer(ThreadingHTTPServer):
    """Serve a viewer on 127.0.0.1.

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

    daemon_threads = True

    def __init__(self, viewer: Viewer, port: int = 0):
        self.viewer = viewer
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"port {port} cannot be used: {reason}; leave --port out for a free one") from error

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: object, client_address: object) -> None:
        # browsers close connections while a tile is sent
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            logger.exception("a request failed")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "hinge", ""
    timeout = 60
    server: ViewerServer

    def do_GET(self) -> None:
        # DNS rebinding: the page of another site must not read a patient's slide
        port = self.server.server_port
        if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, b"this server answers to 127.0.0.1 only\n", ".txt")
            return
        path = urlsplit(self.path).path.removeprefix("/") or "index.html"
        try:
            content = self.server.viewer.read(path)
        except HingeError as error:
            content = json.dumps({"error": str(error)}).encode()
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, content, ".json")
            return
        if content is None:
            self._answer(HTTPStatus.NOT_FOUND, b"not found\n", ".txt")
        else:
            self._answer(HTTPStatus.OK, content, PurePosixPath(path).suffix)

    do_HEAD = do_GET

    def _answer(self, status: HTTPStatus, content: bytes, suffix: str) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", CONTENT_TYPES[suffix])
        self.send_header("Content-Length", str(len(content)))
        tile = suffix == ".jpeg" and status == HTTPStatus.OK
        self.send_header("Cache-Control", "private, max-age=3600" if tile else "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        logger.debug(format, *arguments)


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
