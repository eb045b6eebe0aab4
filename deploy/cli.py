"""The `glimmer` command: finds the subcommand, turns errors into one line and an exit code.

Heavy imports wait until a subcommand runs, so that `--help` answers at once.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence

from .. import __version__
from ..shared.config import ServeConfig
from ..shared.errors import StartError, UsageError
from ..shared.flags import parse_serve_args
from ..shared.log import setup_logging

_HELP = """usage: glimmer COMMAND [options]

A server for GLM-4.7-Flash.

commands:
  serve   serve a checkpoint over HTTP        glimmer serve --model_dir DIR
  demo    serve the bundled model and ask it  glimmer demo [--once]
  check   say what would go wrong             glimmer check --model_dir DIR
  bench   measure                             glimmer bench serve (latency, kernels, overhead)

glimmer COMMAND --help lists a command's options.
exit codes: 0 stopped, 2 usage, 3 bad configuration, 4 bad model, 5 port or runtime directory in
use, 6 GPU lost, 1 other
"""
_BENCHES = ("serve", "latency", "kernels", "overhead")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (None: this process's). Returns the exit code."""
    _open_missing_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if words[0] == "--version":
        print(f"glimmer {__version__}")
        return 0
    commands = {"serve": serve, "demo": _demo, "check": _check, "bench": _bench}
    if words[0] not in commands:
        return guarded(lambda: _unknown(f"unknown command {words[0]!r}", commands))
    return commands[words[0]](words[1:])


def _open_missing_streams() -> None:
    """Where stdin, stdout or stderr is closed, let it be /dev/null: the next thing opened would
    take its number, and what a library prints would end up in there."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def serve(argv: Sequence[str], worker_module: str = "glimmer.workers") -> int:
    """`glimmer serve`; `worker_module` runs in the workers' place. Returns the exit code."""

    def run() -> int:
        config = parse_with_logging(argv)
        from .launcher.launch import launch
        from .launcher.supervise import Modules

        return launch(with_model(config), Modules(worker=worker_module))

    return guarded(run)


def guarded(action: Callable[[], int]) -> int:
    """Run a command; errors that are meant for the user become a line on stderr."""
    try:
        return action()
    except StartError as error:
        print(f"glimmer: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # no room, no permission
        print(f"glimmer: {error}", file=sys.stderr)
        return StartError.exit_code
    except KeyboardInterrupt:  # before there was anything to stop
        return 0
    except SystemExit as request:  # argparse printed its help
        return int(request.code or 0)


def parse_with_logging(argv: Sequence[str]) -> ServeConfig:
    """Parse flags with logging set up before and after: parsing warns about flags."""
    setup_logging("launcher", "info")
    config = parse_serve_args(argv)
    setup_logging("launcher", config.log_level)
    return config


def with_model(config: ServeConfig) -> ServeConfig:
    """The config with a real model directory; 'demo' becomes the bundled model. Raises UsageError
    if none was given."""
    if not config.model_dir:
        raise UsageError("--model_dir is required: a checkpoint directory, or 'demo'")
    if config.model_dir != "demo":
        return config
    from .demo.run import demo_config

    return demo_config(config)


def _demo(argv: Sequence[str]) -> int:
    from .demo.run import demo

    return guarded(lambda: demo(argv))


def _check(argv: Sequence[str]) -> int:
    def run() -> int:
        config = with_model(parse_with_logging(argv))
        from .check import check

        return check(config)

    return guarded(run)


def _bench(argv: Sequence[str]) -> int:
    def run() -> int:
        if not argv or argv[0] not in _BENCHES:
            return _unknown("glimmer bench needs a benchmark", _BENCHES)
        return int(importlib.import_module(f"{__package__}.bench.{argv[0]}").main(argv[1:]))

    return guarded(run)


def _unknown(problem: str, known: Iterable[str]) -> int:
    raise UsageError(f"{problem}; there are: {', '.join(known)}")


if __name__ == "__main__":
    sys.exit(main())
