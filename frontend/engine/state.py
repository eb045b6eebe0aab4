"""What this process knows about the engine, for /health, /readiness, /metrics and admission.

`client.py` writes it from the scheduler's and the launcher's messages.
"""

import asyncio
import math
from dataclasses import dataclass, field

from ...shared.messages import Heartbeat, Ready

_HEARTBEAT_LIMIT_S = 10.0  # an older last heartbeat means that the scheduler is stuck or gone


@dataclass
class EngineState:
    """The engine as last heard of. Times are `time.monotonic`."""

    ready: Ready | None = None  # None: starting, or lost
    last_epoch: int = -1
    heartbeat: Heartbeat | None = None
    heartbeat_at: float = -math.inf
    progress_at: float = -math.inf  # when steps last advanced, or nothing was in flight
    generated_per_s: float = 0.0
    draining: bool = False
    became_ready: asyncio.Event = field(default_factory=asyncio.Event)
    shutdown: asyncio.Event = field(default_factory=asyncio.Event)
    shutdown_at: float = math.inf  # end of the time to drain

    def on_heartbeat(self, heartbeat: Heartbeat, now: float) -> None:
        """Note a heartbeat and whether it shows progress."""
        last = self.heartbeat
        busy = heartbeat.num_running + heartbeat.num_waiting + heartbeat.num_paused > 0
        if last is None or heartbeat.steps != last.steps or not busy:
            self.progress_at = now
        if last is not None and now > self.heartbeat_at:
            tokens = heartbeat.generated_tokens - last.generated_tokens
            self.generated_per_s = max(0.0, tokens / (now - self.heartbeat_at))
        self.heartbeat, self.heartbeat_at = heartbeat, now

    def is_healthy(self, now: float, stall_timeout_s: float) -> bool:
        """Heartbeats come, and steps advance while there is work."""
        alive = now - self.heartbeat_at <= _HEARTBEAT_LIMIT_S
        return alive and now - self.progress_at <= stall_timeout_s

    def why_not_ready(self) -> str:
        """Why new requests are refused; "" if they are not."""
        if self.draining:
            return "draining"
        if self.ready is None:
            return "starting" if self.last_epoch < 0 else "engine lost"
        if self.heartbeat is not None and not self.heartbeat.worker_ready:
            return "engine restarting"
        return ""
