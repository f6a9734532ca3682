"""Stands in for an engine's process: passes lines to and from an engine that `warm_host` forks."""

from __future__ import annotations

import os
import socket
import sys
import threading

ADDRESS = "QUANTKIT_TEST_WARM_HOST"
"""Environment variable with the host's socket."""


def main() -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[ADDRESS])
        connection.sendall(sys.argv[1].encode() + b"\n")
        threading.Thread(target=pass_on, args=(connection,), daemon=True).start()
        with connection.makefile("r") as answers:
            for line in answers:
                print(line, end="", flush=True)
    os._exit(0)  # the thread may still wait for a request


def pass_on(connection: socket.socket) -> None:
    """Requests, until there are no more; then the engine ends."""
    while line := sys.stdin.buffer.readline():
        connection.sendall(line)
    connection.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    main()
