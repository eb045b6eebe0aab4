"""A worker without a model. `--model_owner` says how it misbehaves; on SIGUSR1 it reports that it
failed, and stays."""

import signal
import sys
from dataclasses import replace

from glimmer.shared.errors import ModelError
from glimmer.shared.lifecycle import run_child, start_child
from glimmer.shared.messages import Progress, Ready, Shutdown, WorkerFailed
from glimmer.shared.transport import Receiver, Sender, scheduler_address, worker_address


def main() -> int:
    child = start_child("worker")
    manner = child.config.model_owner
    child.launcher.send(Progress("worker", child.index, "loading weights", 3, 4))
    if manner == "bad-model" or (manner == "bad-later" and child.epoch > 0):
        raise ModelError("shard 3 is truncated")
    if manner == "crash":
        raise ZeroDivisionError("a bug")
    if manner == "stranger":
        config = replace(child.config, port=1)
        child.launcher.send(replace(child, config=config).hello())
    failed = WorkerFailed(child.epoch, child.index, "the card fell out")
    signal.signal(signal.SIGUSR1, lambda *_: child.launcher.send(failed))
    address = worker_address(child.runtime_dir, child.epoch, child.index)
    with Receiver.bind(address) as inbox:
        if manner == "mute-worker":
            signal.pause()
        scheduler = Sender.connect(scheduler_address(child.runtime_dir))
        scheduler.send(child.hello())
        ready = Ready("worker", child.index, child.epoch, 8)
        scheduler.send(ready)
        child.launcher.send(ready)
        while True:  # with a limit: a signal right before the wait is looked at after it
            if any(isinstance(message, Shutdown) for message in inbox.receive(0.1)):
                return 0


if __name__ == "__main__":
    sys.exit(run_child(main))
