"""A web server of the tests' own."""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Server:
    """What is served of `folder` at `address`, and which paths were `asked` for."""

    folder: Path
    address: str = ""
    asked: list[str] = field(default_factory=list)

    def put(self, name: str, content: bytes) -> str:
        """Serve a file from now on, and return its address; what was asked before is forgotten."""
        (self.folder / name).write_bytes(content)
        self.asked.clear()
        return f"{self.address}/{name}"


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve the files of a folder on this machine."""
    served = Server(folder)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            served.asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    served.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
