"""The server on the wire: connections, requests, and faults that strike them."""

import socket
import socketserver
import sys
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from loopback.answers import Answer, Call
from loopback.faults import Request

if TYPE_CHECKING:
    from loopback.hub import LoopbackHub


class Server(ThreadingHTTPServer):
    """Listens, and knows its open connections."""

    request_queue_size = 128

    def __init__(self, hub: "LoopbackHub", port: int) -> None:
        self.hub = hub
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def server_bind(self) -> None:
        # That of HTTPServer would ask the name service for this machine's name.
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def disconnect(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that was killed is nothing to report.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Receives the requests of one connection, and lets faults strike them."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def _serve(self) -> None:
        hub = self.server.hub
        path, _, query = self.path.partition("?")
        if before := hub.before:
            before(self.command, path)
        fault = hub.fault(self.command, path)
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length // 2 if fault.drop == "before" else length)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, path, query, len(body), headers.get("authorization"), headers)
        hub.requests.append(request)
        answer = None
        # A client that was killed has sent a part.
        if fault.drop != "before" and len(body) == length:
            answer = hub.answer(Call(self.command, path, parse_qs(query), headers, body), fault)
        hub.stopping.wait(fault.delay)
        if answer is None or fault.drop == "after":
            self.close_connection = True
            return
        request.status = answer.status
        answer.headers |= fault.headers
        self._send(answer, half=fault.drop == "halfway")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_CONNECT = _serve

    def _send(self, answer: Answer, half: bool) -> None:
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if half else answer.body)
        self.close_connection |= half

    def log_message(self, *_: Any) -> None:
        pass
