"""A scheduler that keeps the process protocol and schedules nothing. Prints what it is told."""

import sys
import time

from glimmer.shared.lifecycle import run_child, start_child
from glimmer.shared.messages import Heartbeat, Hello, PeerLost, Ready, Shutdown
from glimmer.shared.transport import Receiver, Sender, frontend_address, scheduler_address

HEARTBEAT = Heartbeat(0, 0, 0, 0, 8, 8, 0, True, 0, 0, 0, 0, 0)
STUCK = Heartbeat(0, 1, 0, 0, 8, 8, 0, True, 0, 0, 0, 0, 0)  # a request runs, and no step ends


def main() -> int:
    child = start_child("scheduler")
    count = child.config.httpserver_workers
    frontends = [Sender.connect(frontend_address(child.runtime_dir, i)) for i in range(count)]
    ready_ranks: set[int] = set()
    answer: Ready | None = None
    beat = 0.0
    with Receiver.bind(scheduler_address(child.runtime_dir)) as inbox:
        while True:
            for message in inbox.receive(0.2):
                match message:
                    case Hello("frontend", index):
                        if answer is not None:
                            frontends[index].send(answer)
                    case Ready("worker", rank, epoch):
                        ready_ranks.add(rank)
                        if len(ready_ranks) == child.config.tp:
                            answer = Ready("scheduler", 0, epoch, 8, 100)
                            for peer in (child.launcher, *frontends):
                                peer.send(answer)
                    case PeerLost(role):
                        print(f"scheduler told: {message}", file=sys.stderr, flush=True)
                        if role == "worker":
                            ready_ranks.clear()
                            answer = None
                    case Shutdown(drain_s):
                        print(f"scheduler told: {message}", file=sys.stderr, flush=True)
                        if drain_s == 0:
                            return 0
            if time.monotonic() - beat > 0.5 and child.config.model_owner != "mute-scheduler":
                beat = time.monotonic()
                is_stuck = child.config.model_owner == "stuck-steps"
                child.launcher.send(STUCK if is_stuck else HEARTBEAT)


if __name__ == "__main__":
    sys.exit(run_child(main))
