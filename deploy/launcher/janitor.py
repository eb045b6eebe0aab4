"""Outlives a launcher that was killed, just long enough to remove what it left behind.

`python -m glimmer.deploy.launcher.janitor --watch_fd FD --sweep_dir DIR [--whole]`: waits until the
pipe behind FD, whose other end only the launcher holds, reaches its end. The standard library is
all it loads.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from .runtime_dir import empty, kill_leftovers, try_lock

_LOCK_WAIT_S = 1.0  # a dying process closes pipe and lock file in any order


def main(argv: Sequence[str] | None = None) -> int:
    """Wait for the launcher's end; then kill its children and remove its files, unless it did so
    itself or a new server has taken over the directory."""
    parser = argparse.ArgumentParser(prog="glimmer janitor", description=__doc__)
    parser.add_argument("--watch_fd", type=int, required=True)
    parser.add_argument("--sweep_dir", type=Path, required=True)
    parser.add_argument("--whole", action="store_true", help="remove the directory itself, too")
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
