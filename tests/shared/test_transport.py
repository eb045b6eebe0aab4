"""Inboxes are private, ordered, and survive strangers."""

import asyncio
import stat
import subprocess
import sys
import time
from pathlib import Path

import msgpack
import pytest
import zmq
from glimmer.shared.errors import PortError
from glimmer.shared.messages import Abort, Shutdown
from glimmer.shared.transport import AsyncReceiver, Receiver, Sender, scheduler_address


@pytest.fixture
def address(tmp_path: Path) -> str:
    return scheduler_address(str(tmp_path))


def receive_all(receiver: Receiver, count: int) -> list[object]:
    """A batch of malformed messages alone is empty."""
    messages: list[object] = []
    deadline = time.monotonic() + 20
    while len(messages) < count:
        assert time.monotonic() < deadline, f"got {len(messages)} of {count}"
        messages += receiver.receive(5.0)
    return messages


def test_messages_arrive_in_order_also_when_sent_before_the_bind(address: str) -> None:
    sender = Sender.connect(address)
    sent = [Abort([i]) for i in range(1000)]
    for message in sent[:500]:
        sender.send(message)
    with Receiver.bind(address) as receiver:
        for message in sent[500:]:
            sender.send(message)
        assert receive_all(receiver, 1000) == sent
    sender.close()


def test_the_socket_file_is_private_and_removed(address: str) -> None:
    path = Path(address.removeprefix("ipc://"))
    with Receiver.bind(address):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert not path.exists()


def test_malformed_messages_are_counted_and_harm_nobody(address: str) -> None:
    with Receiver.bind(address) as receiver:
        sender = Sender.connect(address)
        for data in (b"", b"\xff" * 10, msgpack.packb(["Abort", "x"])):
            sender.send_bytes(data)
        sender.send(Shutdown(0.0))
        assert receive_all(receiver, 1) == [Shutdown(0.0)]
        assert receiver.malformed == 3
        sender.close()


def test_nothing_there_is_an_empty_list(address: str) -> None:
    with Receiver.bind(address) as receiver:
        assert receiver.receive(0) == []


def test_a_sender_without_a_peer_never_blocks(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glimmer.shared.transport._HIGH_WATER", 10)
    sender = Sender.connect(address)
    for _ in range(50):
        sender.send(Shutdown(0.0))
    assert sender.dropped == 40
    sender.close()


def test_a_bind_that_cannot_work_says_which_address(tmp_path: Path) -> None:
    with pytest.raises(PortError, match="missing"):
        Receiver.bind(f"ipc://{tmp_path}/missing/x.sock")


async def test_the_async_inbox_wakes_on_arrival_and_can_be_cancelled(address: str) -> None:
    with AsyncReceiver.bind(address) as receiver:
        assert isinstance(receiver, AsyncReceiver)
        waiting = asyncio.create_task(receiver.receive_async())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        sender = Sender.connect(address)
        sender.send(Abort([1]))
        assert await asyncio.wait_for(receiver.receive_async(), 5) == [Abort([1])]
        sender.close()


def test_only_ipc_is_used() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    assert not context.closed
    assert scheduler_address("/run/x").startswith("ipc:///run/x/")


ENDING = """
import atexit, sys
from glimmer.shared.messages import Abort
from glimmer.shared.transport import Sender, end_process

atexit.register(print, "taken down", flush=True)
link = Sender.connect(sys.argv[1])
for number in range(1000):
    link.send(Abort([number]))
print("said", end="")
end_process(3)
"""


def test_a_process_that_ends_itself_has_sent_and_said_everything(address: str) -> None:
    with Receiver.bind(address) as receiver:
        command = [sys.executable, "-c", ENDING, address]
        ended = subprocess.run(command, stdout=subprocess.PIPE, timeout=60, check=False)
        assert receive_all(receiver, 1000) == [Abort([i]) for i in range(1000)]
    assert (ended.returncode, ended.stdout) == (3, b"said")
