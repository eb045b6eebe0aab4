"""Health and throughput, as heartbeats tell them."""

from fakes import BEAT
from glimmer.frontend.engine.client import EngineState
from glimmer.shared.messages import Heartbeat


def test_health_is_heartbeats_and_progress_while_busy() -> None:
    state = EngineState()
    assert not state.is_healthy(0.0, 200)
    state.on_heartbeat(Heartbeat(**BEAT), 0.0)
    assert state.is_healthy(9.0, 200)
    assert not state.is_healthy(11.0, 200), "the scheduler is silent"
    for second in range(1, 202):
        state.on_heartbeat(Heartbeat(**BEAT), float(second))
        assert state.is_healthy(second, 200) == (second <= 200), "busy without a step"
    state.on_heartbeat(Heartbeat(**{**BEAT, "steps": 2}), 202.0)
    assert state.is_healthy(202.0, 200)
    idle = Heartbeat(**{**BEAT, "steps": 2, "num_running": 0})
    for second in range(203, 600):
        state.on_heartbeat(idle, float(second))
    assert state.is_healthy(600.0, 200), "idle is healthy"


def test_throughput_is_tokens_between_heartbeats() -> None:
    state = EngineState()
    state.on_heartbeat(Heartbeat(**BEAT), 10.0)
    state.on_heartbeat(Heartbeat(**{**BEAT, "generated_tokens": 500}), 12.0)
    assert state.generated_per_s == 250
    state.on_heartbeat(Heartbeat(**BEAT), 13.0)  # a restarted scheduler counts from zero
    assert state.generated_per_s == 0
