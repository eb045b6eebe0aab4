"""Settles the configuration, checks everything that can be checked, then runs the launcher.

No process is started before the port, the runtime directory and the model have been checked.
"""

import contextlib
import dataclasses
import resource
import time
from collections.abc import Callable
from pathlib import Path

from ...shared.config import ServeConfig
from ...shared.errors import ConfigError, StartError
from ...shared.fingerprint import take_fingerprint
from ...shared.lifecycle import CONFIG_FILE
from ...shared.model_spec import load_model_spec
from ...shared.resolve import resolve
from .checksums import verify_checksums
from .gpu_health import watch_gpus
from .gpus import check_gpus
from .launcher import Launcher
from .listen import bind_port
from .preflight import check_access, check_extras, check_memory, check_model, detect_hardware
from .runtime_dir import claim_runtime_dir, default_parent
from .service import ServiceManager
from .supervise import Children, JanitorKeeper, Modules

_MAX_FILES = 65536
_LEAST_FILES = 60  # of a frontend with a few connections


def launch(
    config: ServeConfig,
    modules: Modules | None = None,
    on_ready: Callable[[Launcher, str], None] | None = None,
) -> int:
    """Serve until stopped. Call from the main thread.

    `config` is as parsed. `on_ready` is called once, with the launcher and the server's URL.
    Returns the exit code. Raises StartError if the server cannot start.
    """
    service = ServiceManager.of_environment()
    try:
        return _launch(config, modules or Modules(), on_ready, service)
    except StartError as error:
        service.failed(str(error))
        raise


def _launch(
    config: ServeConfig,
    modules: Modules,
    on_ready: Callable[[Launcher, str], None] | None,
    service: ServiceManager,
) -> int:
    started = time.monotonic()
    spec = load_model_spec(Path(config.model_dir))
    hardware = detect_hardware()
    config = resolve(config, spec, hardware)
    allow_files(config)
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(contextlib.closing(bind_port(config.host, config.port)))
        metrics_port = None
        if config.metrics_port is not None:
            metrics_port = stack.enter_context(
                contextlib.closing(bind_port(config.host, config.metrics_port, "--metrics_port"))
            )
            metrics_port.share_with_successor()
            config = dataclasses.replace(config, metrics_port=metrics_port.number)
        path = None if config.runtime_dir is None else Path(config.runtime_dir)
        runtime = claim_runtime_dir(path, default_parent())
        janitor = stack.enter_context(contextlib.closing(JanitorKeeper(runtime)))
        stack.callback(runtime.remove)  # runs before the janitor is told to look
        check_access(config)
        check_extras(config)
        check_gpus(config, hardware)
        check_model(config, spec)
        check_memory(config, spec, hardware)
        known = verify_checksums(config) if config.verify_checksums else {}
        config = dataclasses.replace(
            config,
            port=port.number,
            runtime_dir=str(runtime.path),
            model_files=take_fingerprint(config, known),
        )
        config.save(runtime.path / CONFIG_FILE)
        threads = max(1, hardware.num_cpus // config.tp)
        fds = (port.fileno(), metrics_port.fileno() if metrics_port else None)
        children = Children(runtime.path, modules, threads, *fds)
        gpus = watch_gpus(config)
        if gpus is not None:
            stack.callback(gpus.close)
        launcher = Launcher(config, children, janitor, port, started, on_ready, service)
        launcher.gpus = gpus
        return launcher.run()


def allow_files(config: ServeConfig) -> None:
    """Raise the limit of open files: each connection is one, and the usual 1,024 are too few.
    Raises ConfigError if it is too low to start the processes and to replace them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    needed = max(_LEAST_FILES, 40 + 5 * (1 + config.tp + config.httpserver_workers))
    if limit < needed:
        raise ConfigError(
            f"the limit of open files (ulimit -Hn) is {limit}, this server needs {needed}; raise it"
        )
