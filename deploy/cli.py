"""The `glimmer` command: runs a subcommand and turns its errors into one line and an exit code.

Heavy imports wait until a subcommand runs, so that `--help` answers at once.
"""

import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .. import __version__
from ..shared.config import ServeConfig, forget_secret_variables, stderr_is_journal
from ..shared.errors import ModelError, StartError, UsageError
from ..shared.flags import parse_serve_args, serve_parser
from ..shared.log import lossy_stderr, report_error, setup_logging
from ..shared.secrets import hide_arguments

_HELP = """usage: glimmer COMMAND [options]

A server for GLM-4.7-Flash.

commands:
  serve   serve a checkpoint over HTTP          glimmer serve DIR
  demo    serve the bundled model and ask it    glimmer demo [--once]
  ask     ask a running server one question     glimmer ask http://localhost:8000
  check   report what would stop `serve`        glimmer check DIR
  systemd write units for this machine          glimmer systemd --print DIR
  bench   measure speed                         glimmer bench serve

options:
  -h, --help     show this help; glimmer COMMAND --help lists a command's options
  -V, --version  show the version

exit codes: 0 stopped, 2 usage, 3 bad configuration, 4 bad model, 5 port or runtime directory in
use, 6 GPU lost, 1 other
"""
_BENCHES = {
    "serve": "requests to a running server: throughput, and latency as clients see it",
    "latency": "steps of one rank on this machine, without HTTP and scheduler",
    "kernels": "each operation of a step alone, beside the limits of the GPU",
    "overhead": "HTTP, scheduler and sockets, with a worker that takes no time",
}
_BENCH_HELP = """usage: glimmer bench BENCHMARK [options]

Measure speed. Each benchmark prints a table and can write its results as JSON.

benchmarks:
{benchmarks}

glimmer bench BENCHMARK --help lists a benchmark's options.
"""
_CHECK_DESCRIPTION = (
    "Report everything that would stop `glimmer serve` with the same options, without starting it."
    " With --reference, also compare the tokenizer and chat template with those of transformers."
    " With --write_golden, run the model and store its tokens in the directory: later starts"
    " compare theirs with them."
)
_HELP_FLAGS = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (None: this process's). Returns the exit code."""
    _open_missing_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in _HELP_FLAGS:
        print(_HELP, end="")
        return 0
    if words[0] in ("-V", "--version"):
        print(f"glimmer {__version__}")
        return 0
    commands = {
        "serve": serve,
        "demo": _demo,
        "ask": _ask,
        "check": _check,
        "systemd": _systemd,
        "bench": _bench,
    }
    if words[0] not in commands:
        return guarded(lambda: _unknown(f"unknown command {words[0]!r}", commands))
    return commands[words[0]](words[1:])


def _open_missing_streams() -> None:
    """Open /dev/null in the place of a closed stdin, stdout or stderr. Otherwise the next file or
    socket would get its number, and libraries would print into it."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def serve(argv: Sequence[str], worker_module: str = "glimmer.workers") -> int:
    """`glimmer serve`, with `worker_module` as the workers' program. Returns the exit code."""

    def run() -> int:
        config = parse_with_logging(argv)
        from .launcher.launch import launch
        from .launcher.supervise import Modules

        return launch(with_model(config), Modules(worker=worker_module))

    return guarded(run)


def guarded(action: Callable[[], int]) -> int:
    """Run a command. Errors that are meant for the user become one line on stderr."""
    with lossy_stderr():
        try:
            return action()
        except StartError as error:
            report_error(f"glimmer: {error}")
            return error.exit_code
        except OSError as error:  # a full disk or a missing permission
            report_error(f"glimmer: {error}")
            return StartError.exit_code
        except KeyboardInterrupt:  # before the launcher handles signals
            return 0
        except SystemExit as request:  # argparse printed its help
            return int(request.code or 0)


def parse_with_logging(argv: Sequence[str], refused: list[str] | None = None) -> ServeConfig:
    """Parse the flags of `glimmer serve`. The first word may be the model directory itself.
    Logging is set up before, because parsing warns about flags, and again with the level given.
    From now on neither the list of processes nor a child's environment shows an API key. `refused`
    is that of `parse_serve_args`."""
    setup_logging("launcher", "info")
    words = list(argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--model_dir")
    config = parse_serve_args(words, refused=refused)
    hide_arguments()
    forget_secret_variables()
    if config.log_format == "text" and stderr_is_journal():
        config = dataclasses.replace(config, log_format="journal")
    setup_logging("launcher", config.log_level, config.log_format)
    return config


def with_model(config: ServeConfig) -> ServeConfig:
    """The config with real model directories: 'demo' becomes the bundled model. Raises UsageError
    if none was given, ModelError for a name that looks like one of the Hugging Face Hub."""
    if not config.model_dir:
        raise UsageError("--model_dir is required: a checkpoint directory, or 'demo'")
    _refuse_hub_id("model_dir", config.model_dir)
    drafts = config.mtp_draft_model_dir or ()
    for directory in drafts:
        _refuse_hub_id("mtp_draft_model_dir", directory)
    if "demo" not in (config.model_dir, *drafts):
        return config
    from .demo.run import MODEL_DIR, demo_config

    if drafts:
        real = tuple(str(MODEL_DIR) if name == "demo" else name for name in drafts)
        config = dataclasses.replace(config, mtp_draft_model_dir=real)
    return demo_config(config) if config.model_dir == "demo" else config


def _refuse_hub_id(flag: str, directory: str) -> None:
    """Raises ModelError for a name like `org/model` that is not a directory here."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", directory) or Path(directory).exists():
        return
    name = Path(directory).name
    raise ModelError(
        f"--{flag} {directory}: no such directory. A model of the Hugging Face Hub must be "
        f"downloaded first: hf download {directory} --local-dir {name} (in older versions of "
        f"huggingface_hub, hf is huggingface-cli); then give --{flag} {name}"
    )


def _demo(argv: Sequence[str]) -> int:
    from .demo.run import demo

    return guarded(lambda: demo(argv))


def _ask(argv: Sequence[str]) -> int:
    from .ask import main as ask

    return guarded(lambda: ask(argv))


def _check(argv: Sequence[str]) -> int:
    def run() -> int:
        if any(flag in argv for flag in _HELP_FLAGS):
            serve_parser("glimmer check", _CHECK_DESCRIPTION).print_help()
            return 0
        words = [word.replace("-", "_") if word.startswith("--") else word for word in argv]
        own = {"__reference", "__write_golden"} & set(words)
        flags = [word for word, name in zip(argv, words, strict=True) if name not in own]
        refused: list[str] = []
        config = with_model(parse_with_logging(flags, refused))
        from .check import check

        return check(config, refused, "__reference" in own, "__write_golden" in own)

    return guarded(run)


def _systemd(argv: Sequence[str]) -> int:
    from .systemd.command import main as write_units

    return guarded(lambda: write_units(argv))


def _bench(argv: Sequence[str]) -> int:
    def run() -> int:
        if argv and argv[0] in _HELP_FLAGS:
            benchmarks = "\n".join(f"  {name:9} {text}" for name, text in _BENCHES.items())
            print(_BENCH_HELP.format(benchmarks=benchmarks), end="")
            return 0
        if not argv or argv[0] not in _BENCHES:
            return _unknown("glimmer bench needs a benchmark", _BENCHES)
        return int(importlib.import_module(f"{__package__}.bench.{argv[0]}").main(argv[1:]))

    return guarded(run)


def _unknown(problem: str, known: Iterable[str]) -> int:
    raise UsageError(f"{problem}; there are: {', '.join(known)}")


if __name__ == "__main__":
    sys.exit(main())
