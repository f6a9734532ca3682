"""A model hub on this machine: the part of its protocol that reading headers needs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 40

MOST_BYTES = 200_000
"""More than any answer here may have: a header, never the weights behind it."""


class Hub(BaseHTTPRequestHandler):
    """Serves `folder/OWNER/NAME/FILE` as `OWNER/NAME/resolve/REVISION/FILE`."""

    folder: Path
    sent: dict[str, int]
    gated: tuple[str, ...] = ()

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def _answer(self, *, body: bool) -> None:
        owner, name, _, revision, *rest = self.path.strip("/").split("/")
        repository = f"{owner}/{name}"
        if repository in self.gated:
            self._refuse(403, "GatedRepo")
        elif not (self.folder / repository).is_dir():
            self._refuse(404, "RepoNotFound")
        elif revision != "main":
            self._refuse(404, "RevisionNotFound")
        elif not (file := self.folder / repository / "/".join(rest)).is_file():
            self._refuse(404, "EntryNotFound")
        else:
            self._send(file, body=body)

    def _send(self, file: Path, *, body: bool) -> None:
        data, status = file.read_bytes(), 200
        size = len(data)
        if "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            data, status = data[int(first) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{file.name}"')
        self.send_header("X-Linked-Size", str(size))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.sent[file.name] = self.sent.get(file.name, 0) + len(data)
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def hub(folder: Path, gated: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, int]]]:
    """The address of a hub of the models in `folder`, and the bytes it sends of each file."""
    sent: dict[str, int] = {}
    handler = type("HubOfTest", (Hub,), {"folder": folder, "sent": sent, "gated": gated})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def read_all(code: str) -> dict[str, dict[str, object]]:
    """What `READING` printed."""
    found: dict[str, dict[str, object]] = json.loads(code)
    return found


READING = """
import json, sys
from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.footprint import read_model

found = {}
for name in sys.argv[1:]:
    model, _, revision = name.partition("@")
    try:
        read = read_model(model, revision or None)
    except QuantkitError as error:
        found[name] = {"error": f"{type(error).__name__}: {error}"}
    else:
        found[name] = {
            "parameters": read.facts.parameters,
            "listed": read.facts.from_headers,
            "tensors": len(read.tensors),
            "quantised": read.facts.quantization_config is not None,
        }
print(json.dumps(found))
"""
"""A program that reads the models it is given, in a process that learns of the hub by its
environment."""
