"""A FakeServer behind a real socket, for tests of HTTP traffic."""

from __future__ import annotations

import http.server
import threading
from contextlib import contextmanager

import requests

from tests.support.fake_server import URL


@contextmanager
def served(server):
    """The address of *server* (a FakeServer)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self):
            length = int(self.headers.get("Content-Length", 0))
            request = requests.Request(
                self.command, URL + self.path, dict(self.headers), data=self.rfile.read(length)
            )
            answer = server.send(request.prepare())
            self.send_response(answer.status_code)
            headers = {**answer.headers, "Content-Length": str(len(answer.content))}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.content)

        do_GET = do_DELETE = do_PUT = do_POST

        def log_message(self, *args):
            pass

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}"
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join(10)
