"""`glimmer serve` and `glimmer demo` with fake children: `python -m fake_glimmer serve ...`."""

import sys

from glimmer.deploy import cli
from glimmer.deploy.demo import run
from glimmer.deploy.launcher import gpu_health, launch, restarts, supervise, supervisor

MODULES = supervise.Modules("fake_scheduler", "fake_worker", "fake_frontend")


def main(command: str, *flags: str) -> int:
    restarts._BACKOFF_S = 0.5 if "bad-later" in flags else 0.02
    if "impatient-launcher" in flags or "mute-scheduler" in flags:
        supervisor.HEARTBEAT_LIMIT_S = 2.0
        supervisor._PAUSE_S = 1.9
    if "slow-streams" in flags:
        supervisor._DRAIN_GRACE_S = 0.5
    if "mute-frontend" in flags:
        supervisor.FRONTEND_LIMIT_S = 2.0
    if "gpu-fault" in flags:
        launch.watch_gpus = lambda config: gpu_health.GpuHealth(["GPU-0"])
    if command == "demo":
        return cli.guarded(lambda: run.demo(flags, MODULES))
    return cli.guarded(
        lambda: launch.launch(cli.with_model(cli.parse_with_logging(flags)), MODULES)
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
