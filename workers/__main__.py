"""`python -m glimmer.workers --runtime_dir D --index RANK --epoch E`: one tensor-parallel rank."""

import sys

from ..shared.lifecycle import run_child, start_child


def main() -> int:
    """Greet the launcher first: importing torch takes a while."""
    child = start_child("worker")
    from .loop import run_worker

    return run_worker(child)


if __name__ == "__main__":
    sys.exit(run_child(main))
