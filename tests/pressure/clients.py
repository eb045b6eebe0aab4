"""Clients that leave, that do not read, or that never finish their request.

Each function takes the port of a server and returns the number of clients that hung: those whose
connections the server did not end.
"""

import asyncio
import contextlib
import json
import random
import socket
import struct
from typing import Any

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset
_READ_S = 10.0


def post(path: str, body: Any, declared: int | None = None) -> bytes:
    """The bytes of a request. `declared`: a Content-Length that is not the body's."""
    data = json.dumps(body).encode()
    length = len(data) if declared is None else declared
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n".encode() + data


async def _connect(port: int, receive_buffer: int = 0) -> socket.socket:
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    except BaseException:
        sock.close()
        raise
    return sock


async def _ends(sock: socket.socket, patience_s: float) -> bool | None:
    """Read until the connection ends. True: with the end of a reply; False: it was cut; None: it
    does not end."""
    loop = asyncio.get_running_loop()
    tail = b""
    try:
        async with asyncio.timeout(patience_s):
            while received := await loop.sock_recv(sock, 1 << 16):
                tail = (tail + received)[-64:]
    except TimeoutError:
        return None
    except OSError:
        return False
    return tail.endswith((b"0\r\n\r\n", b"}"))


async def vanish(port: int, count: int, at_once: int = 64, seed: int = 0) -> int:
    """Clients that leave at a random moment of a streamed or plain reply, half of them without a
    word. Returns the number that could not even send their request."""
    gate = asyncio.Semaphore(at_once)

    async def one(number: int) -> int:
        rng = random.Random(seed * count + number)
        prompt = [rng.randrange(1, 200) for _ in range(rng.randrange(1, 200))]
        parameters = {"max_new_tokens": 400, "ignore_eos": True}
        path = rng.choice(("/generate", "/generate_stream"))
        request = post(path, {"inputs": prompt, "parameters": parameters})
        async with gate:
            try:
                async with asyncio.timeout(30):
                    sock = await _connect(port)
            except (OSError, TimeoutError):
                return 1
            with sock, contextlib.suppress(OSError):
                await asyncio.get_running_loop().sock_sendall(sock, request)
                await asyncio.sleep(rng.random() * 0.3)
                if rng.random() < 0.5:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        return 0

    return sum(await asyncio.gather(*(one(number) for number in range(count))))


async def slow_readers(
    port: int, count: int, num_tokens: int, patience_s: float
) -> tuple[int, int]:
    """Clients that ask for a long reply, half of them streamed, and read nothing. The server should
    have cut them after `patience_s`. A reply has some 2 KB for each of the `num_tokens` of its
    prompt (the server needs --enable_prompt_logprobs), which must be more than all buffers hold.
    Returns also the number of clients that found their whole reply in spite of that."""
    parameters = {"max_new_tokens": 20, "ignore_eos": True, "prompt_logprobs": 20}
    body = {"inputs": [7] * num_tokens, "parameters": parameters}
    loop = asyncio.get_running_loop()

    async def one(number: int) -> bool | None:
        request = post(("/generate", "/generate_stream")[number % 2], body)
        request = request.replace(b"Host: x", b"Host: x\r\nConnection: close", 1)
        with await _connect(port, receive_buffer=4096) as sock:
            await loop.sock_sendall(sock, request)
            await asyncio.sleep(patience_s)
            return await _ends(sock, _READ_S)

    endings = await asyncio.gather(*(one(number) for number in range(count)))
    return endings.count(None), endings.count(True)


async def slowloris(
    port: int, count: int, patience_s: tuple[float, float], period_s: float = 1.0
) -> int:
    """Clients that send a byte of their head or of their body in each period, without end. The
    server must have cut or answered them after `patience_s`: of heads, of bodies."""
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nX-Long: "
    body = post("/generate", {"inputs": "x"}, declared=100_000)
    loop = asyncio.get_running_loop()

    async def one(number: int) -> int:
        kind = number % 2
        with await _connect(port) as sock:
            try:
                await loop.sock_sendall(sock, (head, body)[kind])
                async with asyncio.timeout(patience_s[kind]):
                    dripping = asyncio.create_task(_drip(sock, period_s))
                    try:
                        await _ends(sock, patience_s[kind] + 1)
                    finally:
                        dripping.cancel()
            except TimeoutError:
                return 1
            except OSError:
                pass
            return 0

    return sum(await asyncio.gather(*(one(number) for number in range(count))))


async def _drip(sock: socket.socket, period_s: float) -> None:
    with contextlib.suppress(OSError):
        while True:
            await asyncio.sleep(period_s)
            await asyncio.get_running_loop().sock_sendall(sock, b" ")
