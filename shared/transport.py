"""Links between the processes of one node: ZeroMQ PUSH -> PULL over private ipc sockets.

Every process binds one inbox in the runtime directory (mode 0700) and connects to the inboxes of
those it talks to. One direction, in order, no loss while both sides live; what was queued for a
dead peer is dropped with its socket. No TCP, no pickle.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn, Self

import zmq
import zmq.asyncio

from .codec import MAX_MESSAGE_BYTES, decode, encode
from .errors import CodecError, PortError
from .messages import AnyMessage, Message

_HIGH_WATER = 100_000  # messages; queues are bounded above this layer
_LINGER_MS = 200  # that a closed link may take to send what is queued


def launcher_address(runtime_dir: str) -> str:
    """Inbox of the launcher."""
    return f"ipc://{runtime_dir}/launcher.sock"


def scheduler_address(runtime_dir: str) -> str:
    """Inbox of the scheduler."""
    return f"ipc://{runtime_dir}/scheduler.sock"


def frontend_address(runtime_dir: str, index: int) -> str:
    """Inbox of HTTP process `index`."""
    return f"ipc://{runtime_dir}/frontend-{index}.sock"


def worker_address(runtime_dir: str, epoch: int, rank: int) -> str:
    """Inbox of one rank of one incarnation: a plan for a dead group never reaches the next."""
    return f"ipc://{runtime_dir}/worker-{epoch}-{rank}.sock"


def end_process(code: int) -> NoReturn:
    """End this process without what the interpreter does at its end, but with what was sent."""
    zmq.Context.instance().destroy(linger=_LINGER_MS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Receiver:
    """An inbox. `malformed` counts messages that were dropped."""

    def __init__(self, socket: zmq.Socket[bytes], address: str) -> None:
        self._socket = socket
        self._path = Path(address.removeprefix("ipc://"))
        self.malformed = 0

    @classmethod
    def bind(cls, address: str) -> Self:
        """Create the socket file, private to this user. Raises PortError if it cannot."""
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.RCVHWM, _HIGH_WATER)
        socket.setsockopt(zmq.LINGER, 0)
        umask = os.umask(0o077)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            socket.close()
            raise PortError(f"cannot bind {address}: {error}") from error
        finally:
            os.umask(umask)
        return cls(socket, address)

    def receive(self, timeout_s: float | None) -> list[AnyMessage]:
        """All messages that are there; waits up to `timeout_s` (None: for ever) for the first.
        Malformed ones are counted and left out, so the list may be empty."""
        messages: list[AnyMessage] = []
        if self._socket.poll(None if timeout_s is None else int(timeout_s * 1000)):
            while True:
                try:
                    data = self._socket.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                self._decode_into(messages, data)
        return messages

    def wait(self, fds: Iterable[int], timeout_s: float) -> list[int]:
        """Wait until a message is there, one of `fds` is readable or the time is over. Returns
        the readable ones."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        for fd in fds:
            poller.register(fd, zmq.POLLIN)
        events = poller.poll(int(timeout_s * 1000) + 1)
        return [fd for fd, _ in events if isinstance(fd, int)]

    def _decode_into(self, messages: list[AnyMessage], data: bytes) -> None:
        try:
            messages.append(decode(data))
        except CodecError:
            self.malformed += 1

    def close(self) -> None:
        """Close and remove the socket file."""
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> "Receiver":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncReceiver(Receiver):
    """The same inbox for an asyncio process."""

    async def receive_async(self) -> list[AnyMessage]:
        """All messages that are there, at least one unless malformed. Cancel-safe."""
        poller = zmq.asyncio.Poller()
        poller.register(self._socket, zmq.POLLIN)
        await poller.poll()
        return self.receive(0)


class Sender:
    """The way to one peer's inbox. Sending never blocks: a peer that stopped reading loses
    messages only after `_HIGH_WATER` of them, and `dropped` counts these."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self.dropped = 0

    @classmethod
    def connect(cls, address: str) -> "Sender":
        """Connect; the peer may bind later. Messages wait until it does."""
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, _HIGH_WATER)
        socket.setsockopt(zmq.LINGER, _LINGER_MS)
        socket.setsockopt(zmq.RECONNECT_IVL, 20)
        socket.connect(address)
        return cls(socket)

    def send(self, message: Message) -> None:
        """Encode and queue one message."""
        self.send_bytes(encode(message))

    def send_bytes(self, data: bytes) -> None:
        """Queue an encoded message (the plan goes to every rank as the same bytes)."""
        try:
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            self.dropped += 1

    def close(self) -> None:
        """Close; what is queued gets 200 ms to leave."""
        self._socket.close()
