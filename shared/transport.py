"""Links between the processes of one node: ZeroMQ PUSH -> PULL over private ipc sockets.

Every process binds one inbox in the runtime directory (mode 0700) and connects to the inboxes of
the processes it sends to. A link has one direction. Messages arrive in order, and none is lost
while both processes live. Closing a link drops the messages that are queued for a dead process. TCP
is not used.

A message is one MessagePack object: `msgpack` reads and writes bytes, `msgspec` checks types. Bytes
from a socket are not trusted: sizes are limited before memory is allocated, every field is checked,
and `CodecError` is the only error.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn, Self

import msgpack
import msgspec
import zmq
import zmq.asyncio

from .errors import CodecError, PortError
from .messages import AnyMessage, Message

logger = logging.getLogger(__name__)
MAX_MESSAGE_BYTES = 64 << 20  # a plan with several 200k-token prompts is about 3 MB
_MALFORMED = (
    msgspec.MsgspecError,
    msgpack.UnpackException,
    ValueError,
    TypeError,
    RecursionError,
)
_LIMITS = {
    "max_str_len": 1 << 20,
    "max_bin_len": 1 << 20,
    "max_array_len": 8 << 20,
    "max_map_len": 1 << 10,
    "max_ext_len": 0,
}
_HIGH_WATER = 100_000  # messages; queues are bounded above this layer
_LINGER_MS = 200  # a closed link has this time to send what is queued


def encode(message: Message) -> bytes:
    """The MessagePack bytes of a message."""
    return msgpack.packb(msgspec.to_builtins(message))  # type: ignore[no-any-return]


def decode(data: bytes) -> AnyMessage:
    """The message in `data`. Raises CodecError unless that is exactly one well-formed message of a
    known type."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise CodecError(f"message of {len(data)} bytes, limit {MAX_MESSAGE_BYTES}")
    try:
        message: AnyMessage = msgspec.convert(msgpack.unpackb(data, **_LIMITS), AnyMessage)
    except _MALFORMED as error:
        raise CodecError(f"malformed message: {error}") from error
    return message


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
    """Inbox of one rank of one worker group: a plan for a dead group never reaches the next one."""
    return f"ipc://{runtime_dir}/worker-{epoch}-{rank}.sock"


def end_process(code: int) -> NoReturn:
    """Send queued messages, then end this process without the interpreter's clean-up."""
    zmq.Context.instance().destroy(linger=_LINGER_MS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _bind(socket: "zmq.Socket[bytes]", address: str) -> None:
    umask = os.umask(0o077)
    try:
        socket.bind(address)
    finally:
        os.umask(umask)


class Receiver:
    """An inbox. `malformed` counts malformed messages, which are dropped."""

    def __init__(self, socket: zmq.Socket[bytes], address: str) -> None:
        self._socket = socket
        self._address = address
        self._path = Path(address.removeprefix("ipc://"))
        self._inode = self._path.stat().st_ino
        self._problem = ""  # of the last `repair`
        self.malformed = 0

    @classmethod
    def bind(cls, address: str) -> Self:
        """Create the socket file, private to this user. Raises PortError if it cannot."""
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.RCVHWM, _HIGH_WATER)
        socket.setsockopt(zmq.LINGER, 0)
        try:
            _bind(socket, address)
        except zmq.ZMQError as error:
            socket.close()
            raise PortError(f"cannot bind {address}: {error}") from error
        return cls(socket, address)

    def repair(self) -> None:
        """Bind again if the socket file has vanished, so that other processes can connect. Call it
        every second. Links that are connected do not need the file."""
        problem = ""
        try:
            if self._path.stat().st_ino == self._inode:
                return
            problem = "was replaced"
        except OSError as error:
            problem = f"vanished ({error.strerror})"
        try:
            _bind(self._socket, self._address)  # the old binding stays, and so do its links
            self._inode = self._path.stat().st_ino
            logger.warning("%s %s: bound again", self._path, problem)
        except (zmq.ZMQError, OSError) as error:
            if str(error) != self._problem:
                logger.error("%s %s and cannot be bound: %s", self._path, problem, error)
            self._problem = str(error)

    def receive(self, timeout_s: float | None) -> list[AnyMessage]:
        """All messages that have arrived. Waits up to `timeout_s` (None: no limit) for the first.
        Malformed ones are counted and left out, so the list may be empty."""
        messages: list[AnyMessage] = []
        if self._socket.poll(None if timeout_s is None else int(timeout_s * 1000)):
            while True:
                try:
                    data = self._socket.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                try:
                    messages.append(decode(data))
                except CodecError:
                    self.malformed += 1
        return messages

    def wait(self, fds: Iterable[int], timeout_s: float) -> list[int]:
        """Wait until a message has arrived, one of `fds` is readable, or the time is over. Returns
        the readable `fds`."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        for fd in fds:
            poller.register(fd, zmq.POLLIN)
        events = poller.poll(int(timeout_s * 1000) + 1)
        return [fd for fd, _ in events if isinstance(fd, int)]

    def close(self) -> None:
        """Close and remove the socket file."""
        self._socket.close()
        with contextlib.suppress(OSError):  # gone, or on a read-only disk
            self._path.unlink()

    def __enter__(self) -> "Receiver":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncReceiver(Receiver):
    """The same inbox for an asyncio process."""

    async def receive_async(self) -> list[AnyMessage]:
        """Wait for a message, then return all that have arrived. Cancelling it loses no message."""
        poller = zmq.asyncio.Poller()
        poller.register(self._socket, zmq.POLLIN)
        await poller.poll()
        return self.receive(0)


class Sender:
    """A link to the inbox of another process. Sending never blocks. If `_HIGH_WATER` messages wait
    because the other process does not read, further ones are dropped, and `dropped` counts them."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self.dropped = 0

    @classmethod
    def connect(cls, address: str) -> "Sender":
        """Connect to an address. Messages wait until the other process binds it. Raises OSError if
        this process has too many files open."""
        try:
            socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"cannot open a link: {error}") from error
        socket.setsockopt(zmq.SNDHWM, _HIGH_WATER)
        socket.setsockopt(zmq.LINGER, _LINGER_MS)
        socket.setsockopt(zmq.RECONNECT_IVL, 20)
        socket.connect(address)
        return cls(socket)

    def send(self, message: Message) -> bool:
        """Encode and queue one message. False if it was dropped."""
        return self.send_bytes(encode(message))

    def send_bytes(self, data: bytes) -> bool:
        """Queue an encoded message (the plan goes to every rank as the same bytes)."""
        try:
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            self.dropped += 1
            return False
        return True

    def close(self) -> None:
        """Close. Queued messages have 200 ms to leave."""
        self._socket.close()
