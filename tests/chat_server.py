"""A chat endpoint on this machine, with the faults of real ones, and fixtures for it."""

import contextlib
import json
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hyperlora.evaluation import endpoint as endpoint_module


def replies_of(body: dict[str, Any]) -> tuple[str, str]:
    user = body["messages"][-1]["content"]
    return tuple(user.split(f"[reply {name}]\n")[1].split("\n[end of")[0] for name in "AB")  # type: ignore[return-value]


def fair(body: dict[str, Any]) -> str:
    return json.dumps({"reason": "It is so.", "choice": "AB"[replies_of(body).index("Maro")]})


class Server(ThreadingHTTPServer):
    """A chat endpoint. `faults` are met by one request each, in order; then `answer` replies."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.faults: list[str | int] = []
        self.answer: Callable[[dict[str, Any]], str | None] = fair
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.closing = threading.Event()
        self.retry_after = ""


def killing(server: Server, process: subprocess.Popen[bytes], request: int) -> Callable[[dict[str, Any]], str]:
    """Answers fairly, and kills the process that asks with its request of that number."""

    def answer(body: dict[str, Any]) -> str:
        if len(server.bodies) == request:
            process.kill()
            process.wait()
        return fair(body)

    return answer


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions" and self.headers["Content-Type"] == "application/json"
        self.server.bodies.append(body)
        self.server.keys.append(self.headers["Authorization"])
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "hang":
            self.server.closing.wait(30)
        elif fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "cut":
            self.send(200, '{"choices": [{"mess', length=500)
            self.connection.shutdown(socket.SHUT_RDWR)
        elif isinstance(fault, int):
            self.send(fault, f"no\n {self.headers['Authorization']}")
        elif fault is not None:
            self.send(200, fault)
        else:
            self.send(200, json.dumps({"choices": [{"message": {"content": self.server.answer(body)}}]}))

    def send(self, code: int, text: str, length: int | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(length or len(text.encode())))
        if 300 <= code < 400:
            self.send_header("Location", self.server.url + "/chat/completions")
        if self.server.retry_after:
            self.send_header("Retry-After", self.server.retry_after)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in endpoint_module.KEY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited between attempts."""
    found: list[float] = []
    monkeypatch.setattr(endpoint_module.time, "sleep", found.append)
    return found
