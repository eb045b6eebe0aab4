"""Virtual processes and links of one server: what `server_world.py` is made of."""

from collections import deque
from typing import TYPE_CHECKING, Any

from glimmer.shared.errors import StartError
from glimmer.shared.messages import Message, StepPlan
from glimmer.shared.transport import decode

if TYPE_CHECKING:
    from server_world import ServerWorld

MS = 1_000_000


class Link:
    """A `Sender`: in order, with delays. Messages wait while their receiver is dead or does not
    read; at the high-water mark further ones are dropped."""

    def __init__(self, world: "ServerWorld", owner: Any, address: str) -> None:
        self._world = world
        self._owner = owner
        self._queue: deque[Message] = deque()
        self._last_ns = 0
        self._is_closed = False
        self.address = address
        self.dropped = 0
        world.links.append(self)

    def send_bytes(self, data: bytes) -> bool:
        return self.send(decode(data))

    def send(self, message: Message) -> bool:
        world = self._world
        if self._is_closed or (self._owner is not None and self._owner.returncode is not None):
            return True  # of a process that is gone
        fails = world.fires("message")
        if fails or len(self._queue) >= world.high_water:
            self.dropped += 1
            world.faults["dropped message"] += 1
            world.dropped.append(f"{type(message).__name__} to {self.address}")
            return False
        if isinstance(message, StepPlan):
            world.plan_heard[message.epoch, message.step] = world.heard_failures[message.epoch]
        self._queue.append(message)
        self._last_ns = max(self._last_ns, world.now_ns + world.rng.choice((0, 0, 1, 4)) * MS // 8)
        world.at(self._last_ns, self._deliver)
        return True

    def _deliver(self) -> None:
        receiver = self._world.bound.get(self.address)
        if self._queue and receiver is not None and receiver.reads:
            receiver.receive(self._queue.popleft())

    def flush(self) -> None:
        """The receiver reads (again)."""
        for _ in range(len(self._queue)):
            self._deliver()

    def lose(self, count: int) -> None:
        """The first messages were on their way to a process that died."""
        for _ in range(min(count, len(self._queue))):
            self._queue.popleft()

    def close(self) -> None:
        self.flush()
        self._queue.clear()
        self._is_closed = True


class Process:
    """A child of the launcher, as `supervise.Process` shows it."""

    def __init__(self, world: "ServerWorld", role: str, index: int, epoch: int) -> None:
        self.world = world
        self.role, self.index, self.epoch = role, index, epoch
        self.pid = world.new_pid()
        self.address = world.address(role, index, epoch)
        self.sender = Link(world, None, self.address)
        self.launcher = Link(world, self, "launcher")
        self.returncode: int | None = None
        self.greeted = self.ready = False
        self.stage = "starting"
        self.started = self.heard = world.seconds()
        self.reads = True

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}"

    @property
    def is_alive(self) -> bool:
        return self.returncode is None

    def bind(self) -> None:
        self.world.bound[self.address] = self
        for link in self.world.links:
            if link.address == self.address:
                link.flush()

    def freeze(self, for_ns: int) -> None:
        """It is stopped, or its loop hangs."""
        if self.is_alive:
            self.reads = False
            self.world.after(for_ns, self._thaw)

    def _thaw(self) -> None:
        if self.is_alive:
            self.reads = True
            if self.world.bound.get(self.address) is self:
                self.bind()

    def die(self, code: int) -> None:
        world = self.world
        if not self.is_alive:
            return
        self.returncode = code
        if world.bound.get(self.address) is self:
            del world.bound[self.address]
            for link in world.links:
                if link.address == self.address:
                    link.lose(world.rng.choice((0, 0, 1, 100)))
        self.on_death()
        world.wake_launcher()

    def on_death(self) -> None:
        """Clean up."""

    def receive(self, message: Message) -> None:
        """A message has arrived."""
        raise NotImplementedError


class Children:
    """The live ones, as `supervise.Children` shows them."""

    def __init__(self, world: "ServerWorld") -> None:
        self._world = world
        self.alive: list[Process] = []

    def spawn(self, role: str, index: int, epoch: int) -> Process:
        if self._world.fires("spawn"):
            raise OSError(24, "too many open files")
        assert self.find(role, index) is None, f"{role} {index} runs twice"
        process = self._world.make(role, index, epoch)
        self.alive.append(process)
        return process

    def of(self, role: str) -> list[Process]:
        return [process for process in self.alive if process.role == role]

    def find(self, role: str, index: int) -> Process | None:
        return next((p for p in self.of(role) if p.index == index), None)

    def reap(self) -> list[tuple[Process, str]]:
        ended = [process for process in self.alive if not process.is_alive]
        return [(process, self._bury(process)) for process in ended]

    def kill(self, processes: list[Process]) -> None:
        for process in list(processes):
            process.die(-9)
            self._bury(process)

    def _bury(self, process: Process) -> str:
        self.alive.remove(process)
        process.sender.close()
        return f"ended with {process.returncode}"

    def let_exit(self, process: Process) -> None:
        pass

    def log_stacks(self, occasion: str) -> None:
        pass


__all__ = ["MS", "Children", "Link", "Process", "StartError"]
