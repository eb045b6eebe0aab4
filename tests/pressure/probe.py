"""Asks one path over one connection, again and again, until its stdin is closed. Prints the times.

`python tests/pressure/probe.py PORT [PATH]`. A process of its own, with nothing but this loop: the
delays of a load generator must not count. Needs the standard library only.
"""

import json
import socket
import sys
import threading
import time

_PERIOD_S = 0.01
_LIMIT_S = 30.0


def ask(sock: socket.socket, request: bytes) -> bytes:
    """The head of the reply, once the whole reply is here. Raises OSError."""
    sock.sendall(request)
    data = b""
    while b"\r\n\r\n" not in data:
        received = sock.recv(1 << 16)
        if not received:
            raise ConnectionError
        data += received
    head, _, body = data.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            missing = int(line[15:]) - len(body)
            while missing > 0:
                missing -= len(sock.recv(missing)) or missing
    return head


def main(port: int, path: str) -> None:
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    times: list[float] = []
    failures = 0
    sock = None
    while not ended.is_set():
        try:
            if sock is None:
                sock = socket.create_connection(("127.0.0.1", port), _LIMIT_S)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                ask(sock, request)  # the first reply includes the connection
            begun = time.perf_counter()
            ask(sock, request)
            times.append(time.perf_counter() - begun)
        except OSError:
            failures += 1
            if sock is not None:
                sock.close()
            sock = None
        ended.wait(_PERIOD_S)
    print(json.dumps({"times": times, "failures": failures}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "/liveness")
