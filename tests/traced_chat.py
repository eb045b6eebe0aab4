"""Runs the real frontend, scheduler and worker of a checkout in threads of this process, streams
chats through them on the CPU, and collects the functions that ran.

`python tests/traced_chat.py ROOT [NUM_DRAFTS]` prints them as JSON: `path` and `rooms` are lists of
[file, first line of the function]. The demo model serves. A first chat fills caches and is not
counted. Then more chats follow, each with another question, and a function counts if it ran for
every one of them. Work on a timer, such as a heartbeat, is stopped meanwhile. The process that
renders chat templates runs, but is not traced.

`rooms` are the functions of `workers/` that were given the `StepPlan`, a part of it (`RowAdmit`,
`PagesAppended`, `PrefillChunk`, or a list of those), or an object with an attribute that is the
plan.

ROOT may be an older checkout with other folders inside `frontend`, `scheduler` and `workers`: names
that this script imports must exist in all of them.
"""

import asyncio
import http.client
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

NUM_CHATS = 8
MAX_TOKENS = 8
START_TIMEOUT_S = 120.0
_PERIOD_S = 1.0  # of heartbeats
_NEVER_S = 1e6
# The scheduler's heartbeats, and how long the frontend trusts the last one.
_TIMERS = {"HEARTBEAT_NS": int(_NEVER_S * 1e9), "_HEARTBEAT_LIMIT_S": _NEVER_S}


@dataclass
class Trace:
    """Code objects that began to run, and those of them that were given a plan."""

    codes: set[CodeType] = field(default_factory=set)
    rooms: set[CodeType] = field(default_factory=set)


class Tracer:
    """Records in all threads that start after `install`."""

    def __init__(self) -> None:
        self._trace = Trace()
        self._is_on = False
        self._plan_types: tuple[type, ...] = ()

    def install(self) -> None:
        monitoring = getattr(sys, "monitoring", None)  # since 3.12
        if monitoring is None:
            threading.settrace(self._on_call)
            sys.settrace(self._on_call)
        else:
            events = monitoring.events
            monitoring.use_tool_id(monitoring.PROFILER_ID, "traced_chat")
            for event in (events.PY_START, events.PY_RESUME):
                monitoring.register_callback(monitoring.PROFILER_ID, event, self._on_start)
            monitoring.set_events(monitoring.PROFILER_ID, events.PY_START | events.PY_RESUME)

    def record(self, act: Callable[[], None]) -> Trace:
        """What began to run, or went on, while `act` did."""
        from glimmer.shared.messages import PagesAppended, PrefillChunk, RowAdmit, StepPlan

        self._plan_types = (StepPlan, RowAdmit, PagesAppended, PrefillChunk)
        self._trace = Trace()
        self._is_on = True
        act()
        self._is_on = False
        return self._trace

    def _on_call(self, frame: FrameType, event: str, argument: object) -> None:
        if not self._is_on:
            return
        code = frame.f_code
        self._trace.codes.add(code)
        if "/glimmer/workers/" in code.co_filename and self._gets_plan(frame):
            self._trace.rooms.add(code)

    def _on_start(self, code: CodeType, offset: int) -> None:
        if self._is_on:
            self._on_call(sys._getframe(1), "call", None)

    def _gets_plan(self, frame: FrameType) -> bool:
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        return any(self._holds_plan(frame.f_locals.get(name)) for name in names)

    def _holds_plan(self, value: object) -> bool:
        if isinstance(value, list | tuple):
            return bool(value) and isinstance(value[0], self._plan_types)
        if isinstance(value, self._plan_types):
            return True
        attributes = getattr(value, "__dict__", {}).values()
        return any(isinstance(attribute, self._plan_types) for attribute in attributes)


def use_checkout(root: Path, directory: Path) -> None:
    """Let `import glimmer` find `root`, also in processes that this one starts."""
    (directory / "glimmer").symlink_to(root)
    sys.path.insert(0, str(directory))
    os.environ["PYTHONPATH"] = str(directory)


def find_demo_model(root: Path) -> Path:
    return next((root / "deploy").rglob("model.safetensors.index.json")).parent


def settle(model_dir: Path, port: int, num_drafts: int) -> Any:
    """The configuration of `glimmer serve` for the demo model on a CPU."""
    from glimmer.shared.config import ServeConfig
    from glimmer.shared.model_spec import load_model_spec
    from glimmer.shared.resolve import Hardware, resolve

    config = ServeConfig(
        model_dir=str(model_dir),
        device="cpu",
        data_type="float32",
        port=port,
        max_total_token_num=16384,
        reasoning_parser="glm45",
        mtp_mode="eagle_with_att" if num_drafts else None,
        mtp_step=num_drafts,
        mtp_fixed_step=bool(num_drafts),
    )
    return resolve(config, load_model_spec(model_dir), Hardware(8 << 30, 2))


def start_processes(runtime_dir: str) -> None:
    """All three, each in a thread. They find their configuration in `runtime_dir`."""
    from glimmer.frontend.app import serve
    from glimmer.scheduler.loop import SchedulerLoop
    from glimmer.shared.lifecycle import start_child
    from glimmer.workers.loop import run_worker

    def child(role: str) -> Any:
        return start_child(role, ["--runtime_dir", runtime_dir])

    def run_frontend() -> None:
        loop = asyncio.new_event_loop()
        loop.add_signal_handler = lambda *_: None  # type: ignore[method-assign]
        loop.run_until_complete(serve(child("frontend")))

    def run_scheduler() -> None:
        SchedulerLoop(child("scheduler")).run()

    def work() -> None:
        run_worker(child("worker"))

    for target in (run_scheduler, work, run_frontend):
        threading.Thread(target=target, daemon=True).start()


def wait_for_frontend(launcher: Any) -> None:
    """Until it listens. A process that fails ends this one."""
    from glimmer.shared.messages import Ready

    while True:
        messages = launcher.receive(START_TIMEOUT_S)
        if not messages:
            raise TimeoutError("the server did not start")
        if any(isinstance(m, Ready) and m.role == "frontend" for m in messages):
            return


def stop_timers() -> None:
    """Almost no heartbeats and other periodic work from now on: on a busy machine they would run
    during every chat."""
    sleep = asyncio.sleep

    async def sleep_long(delay: float) -> None:
        await sleep(delay if delay < _PERIOD_S / 2 else _NEVER_S)

    asyncio.sleep = sleep_long  # type: ignore[assignment]
    for name, module in list(sys.modules.items()):
        if name.startswith("glimmer."):
            for constant, value in _TIMERS.items():
                if hasattr(module, constant):
                    setattr(module, constant, value)
    time.sleep(2 * _PERIOD_S)  # the timers that run have ended then


def ask(port: int, question: str) -> None:
    """Stream one chat and read it to the end."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": MAX_TOKENS,
        "stream": True,
    }
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    reply = connection.getresponse()
    text = reply.read()
    connection.close()
    if reply.status != 200 or not text.endswith(b"data: [DONE]\n\n"):
        raise RuntimeError(f"HTTP {reply.status}: {text.decode()}")


def trace_chats(root: Path, directory: Path, num_drafts: int) -> Trace:
    """What every chat ran."""
    use_checkout(root, directory)
    tracer = Tracer()
    tracer.install()
    from glimmer.shared.transport import Receiver, launcher_address

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    runtime_dir = directory / "run"
    runtime_dir.mkdir()
    settle(find_demo_model(root), port, num_drafts).save(runtime_dir / "config.json")
    launcher = Receiver.bind(launcher_address(str(runtime_dir)))
    start_processes(str(runtime_dir))
    wait_for_frontend(launcher)
    stop_timers()
    ask(port, "Who are you?")
    traces = []
    for number in range(NUM_CHATS):
        traces.append(tracer.record(partial(ask, port, f"What is {number} + 3?")))
    return Trace(
        set.intersection(*(trace.codes for trace in traces)),
        set.intersection(*(trace.rooms for trace in traces)),
    )


def describe(codes: set[CodeType], package: Path) -> list[tuple[str, int]]:
    """File (relative to the package) and first line of code objects that lie in the package."""
    prefix = f"{package}{os.sep}"
    return sorted(
        (code.co_filename.removeprefix(prefix), code.co_firstlineno)
        for code in codes
        if code.co_filename.startswith(prefix) and code.co_name != "<module>"
    )


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    root = Path(sys.argv[1]).resolve()
    num_drafts = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as directory:
        trace = trace_chats(root, Path(directory), num_drafts)
        package = Path(directory) / "glimmer"
    result = {"path": describe(trace.codes, package), "rooms": describe(trace.rooms, package)}
    print(json.dumps(result), flush=True)
    os._exit(0)  # the threads serve on


if __name__ == "__main__":
    main()
