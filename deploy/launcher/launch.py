"""Settles the configuration, checks everything that can be checked, then runs the launcher.

No process is started before the port, the runtime directory and the model have been checked.
"""

import contextlib
import dataclasses
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ...shared.config import ServeConfig, environment
from ...shared.lifecycle import CONFIG_FILE
from ...shared.model_spec import load_model_spec
from ...shared.resolve import resolve
from .gpus import check_gpus
from .launcher import Launcher
from .listen import bind_port
from .preflight import check_access, check_memory, check_model, detect_hardware
from .runtime_dir import claim_runtime_dir
from .supervise import Children, JanitorKeeper, Modules

_MAX_FILES = 65536


def launch(
    config: ServeConfig,
    modules: Modules | None = None,
    on_ready: Callable[[Launcher, str], None] | None = None,
) -> int:
    """Serve until stopped. Call from the main thread.

    `config` is as parsed. `on_ready` is called once, with the launcher and the server's URL.
    Returns the exit code. Raises StartError if the server cannot start.
    """
    started = time.monotonic()
    _allow_connections()
    spec = load_model_spec(Path(config.model_dir))
    hardware = detect_hardware()
    config = resolve(config, spec, hardware)
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(contextlib.closing(bind_port(config.host, config.port)))
        path = None if config.runtime_dir is None else Path(config.runtime_dir)
        runtime = claim_runtime_dir(path, default_parent())
        janitor = stack.enter_context(contextlib.closing(JanitorKeeper(runtime)))
        stack.callback(runtime.remove)  # runs before the janitor is told to look
        check_access(config)
        check_gpus(config, hardware)
        check_model(config, spec)
        check_memory(config, spec, hardware)
        config = dataclasses.replace(config, port=port.number, runtime_dir=str(runtime.path))
        config.save(runtime.path / CONFIG_FILE)
        threads = max(1, hardware.num_cpus // config.tp)
        children = Children(runtime.path, modules or Modules(), threads, port.listener.fileno())
        return Launcher(config, children, janitor, port, started, on_ready).run()


def _allow_connections() -> None:
    """Raise the limit of open files: each connection is one, and the usual 1,024 are too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def default_parent() -> Path:
    """The parent of default runtime directories: $XDG_RUNTIME_DIR, or the temporary directory."""
    parent = Path(environment().get("XDG_RUNTIME_DIR", ""))
    usable = parent.is_absolute() and os.access(parent, os.W_OK | os.X_OK)
    return parent if usable else Path(tempfile.gettempdir())
