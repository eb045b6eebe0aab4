"""Removes the processes and files that a killed launcher left behind.

`python -m glimmer.deploy.launcher.janitor --watch_fd FD --sweep_dir DIR [--whole]` waits until the
pipe behind FD is closed; only the launcher holds its other end. Loads only the standard library.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from .runtime_dir import empty, kill_leftovers, try_lock

_LOCK_WAIT_S = 1.0  # the launcher may close the pipe before it releases the lock


def main(argv: Sequence[str] | None = None) -> int:
    """Wait for the launcher's end, then kill its children and remove its files. Nothing is done if
    the launcher removed them itself or a new server uses the directory."""
    parser = argparse.ArgumentParser(prog="glimmer janitor", description=__doc__)
    parser.add_argument("--watch_fd", type=int, required=True)
    parser.add_argument("--sweep_dir", type=Path, required=True)
    parser.add_argument("--whole", action="store_true", help="also remove the directory")
    args = parser.parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(args.watch_fd, 1):
        pass
    try:
        lock_fd = try_lock(args.sweep_dir, _LOCK_WAIT_S)
    except OSError:  # the directory is gone
        return 0
    if lock_fd is not None:
        kill_leftovers(args.sweep_dir)
        empty(args.sweep_dir, args.whole)
    return 0


if __name__ == "__main__":
    sys.exit(main())
