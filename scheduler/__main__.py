"""`python -m glimmer.scheduler`: run the scheduler process. The work is in `loop.py`."""

import signal
import sys

from ..shared.lifecycle import run_child, start_child
from .loop import SchedulerLoop


def main() -> int:
    """Serve until the launcher says stop. A bug ends the process: the launcher restarts it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to handle
    child = start_child("scheduler")
    try:
        SchedulerLoop(child).run()
    finally:
        child.launcher.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_child(main))
