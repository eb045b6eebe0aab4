"""Metrics of the engine and of the processes."""

from typing import Any

from glimmer.frontend.engine.engine_metrics import kv_usage
from glimmer.shared.messages import Heartbeat, LauncherBeat


def test_pages_of_the_prefix_cache_are_not_in_use() -> None:
    beat = Heartbeat(0, 0, 0, 0, 100, 50, 30, True, 0, 0, 0, 0, 0)
    assert kv_usage(beat) == 0.2
    assert kv_usage(Heartbeat(0, 0, 0, 0, 0, 0, 0, True, 0, 0, 0, 0, 0)) == 0


async def test_losses_of_every_process_and_stalls_are_counted(server: Any) -> None:
    server.engine.send(LauncherBeat(stalls=2, worker_log_lines=5, dropped_log_lines=3))
    server.engine.beat(dropped_log_lines=7)
    state = server.frontend.client.state
    await server.settle(lambda: state.launcher is not None and state.heartbeat.dropped_log_lines)
    text = (await server.get("/metrics"))[1]
    for process, count in (
        ("worker", 5.0),
        ("launcher", 3.0),
        ("scheduler", 7.0),
        ("frontend", 0.0),
    ):
        labels = f'model_name="tiny",process="{process}"'
        assert f"glimmer_log_lines_dropped_total{{{labels}}} {count}" in text
    assert 'glimmer_stalls_total{model_name="tiny"} 2.0' in text
