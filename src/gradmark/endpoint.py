"""A bare prediction API on the standard library, for the demo and the tests.

``POST`` any path with ``{"inputs": [...]}`` answers ``{"outputs": [[...], ...]}``. It listens on
the loopback interface unless told otherwise and has no access control: don't expose it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

Predict = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
"""Float32 inputs (b, *shape) to scores (b, C)."""

_LARGEST_REQUEST = 256 * 2**20


@contextmanager
def serve(predict: Predict, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Answer with ``predict`` while the block runs; yields the address. Port 0 takes a free one."""

    class Handler(_Handler):
        model = staticmethod(predict)

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_address[1]}/predict"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    model: Predict

    def do_POST(self) -> None:
        try:
            length = int(self.headers.get("Content-Length", ""))
            if not 0 <= length <= _LARGEST_REQUEST:
                raise ValueError("its length")
        except ValueError:
            self.close_connection = True
            self._answer(400, {"error": "Content-Length must say how long the request is, at most 256 MiB"})
            return
        try:
            inputs = np.asarray(json.loads(self.rfile.read(length))["inputs"], dtype=np.float32)
            if inputs.ndim < 2:
                raise ValueError("inputs must be a list of arrays")
        except (ValueError, TypeError, KeyError, RecursionError):
            self._answer(400, {"error": 'expected {"inputs": [[...], ...]}'})
            return
        try:
            outputs = np.asarray(self.model(inputs), dtype=np.float64).tolist()
        except Exception:  # a service says no more about its failures to strangers
            self._answer(500, {"error": "the model failed on these inputs"})
            return
        self._answer(200, {"outputs": outputs})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: the demo's output is for the user's eyes."""
