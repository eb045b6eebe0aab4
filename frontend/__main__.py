"""One HTTP process: `python -m glimmer.frontend` (see `shared/lifecycle.py` for its arguments)."""

import asyncio
import sys

import uvloop

from ..shared.lifecycle import run_child, start_child


def main() -> int:
    """Returns after draining; raises StartError when it cannot start. Greets the launcher first:
    importing the tokenizer library takes a while."""
    child = start_child("frontend")
    from .app import serve

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(child))
    return 0


if __name__ == "__main__":
    sys.exit(run_child(main))
