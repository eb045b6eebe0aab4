"""Faults made by hand in what starts, tells and connects processes."""

from glimmer.deploy.launcher import restarts, supervisor
from glimmer.frontend.engine import client
from glimmer.scheduler import loop, worker_group
from limit_mutants import Mutant, edit

_losses = supervisor.Supervisor, "_lost_engine"

SERVER_MUTANTS: dict[str, Mutant] = {
    "does not notice that a message to a frontend was dropped": edit(
        loop.Links, "send", "self.full.add(outgoing.index)", "pass"
    ),
    "does not tell a frontend that output was lost": edit(
        loop.SchedulerLoop, "_cut_frontends", ".send(lost)", ".dropped"
    ),
    "does not notice that a request was dropped": edit(
        client.EngineClient, "submit", "if self._sender.dropped != dropped", "if 0"
    ),
    "lets anybody abort a request by its name": edit(
        client.EngineClient, "abort_named", "and tenant in (None, generation.tenant)", ""
    ),
    "leaves streams open when the scheduler is lost": edit(
        client.EngineClient, "_on_scheduler_lost", "self.fail_all(", "str("
    ),
    "does not tell frontends that the scheduler is lost": edit(
        *_losses, 'self.tell("frontend",', 'str("frontend") and str('
    ),
    "keeps the other ranks of a group": edit(
        *_losses, 'self._children.kill(self._children.of("worker"))', "pass"
    ),
    "never waits longer before a restart": edit(
        restarts.Restarts, "schedule", "(2 ** min(len(recent), 10) - 1)", "0"
    ),
    "never forgets old restarts": edit(
        restarts.Restarts, "schedule", "if now - at < _MEMORY_S", ""
    ),
    "never gives up": edit(
        restarts.Restarts, "lost", "attempts >= _MAX_ATTEMPTS", "attempts >= 1000"
    ),
    "counts restarts that helped": edit(
        restarts.Restarts, "helped", "del self._attempts[unit_of(process)]", "pass"
    ),
    "never takes a step for hung": edit(
        worker_group.WorkerGroup, "is_overdue", "return bool(", "return False and bool("
    ),
}

# These are found when one message is dropped, see the sweeps.
SWEEP_MUTANTS: dict[str, Mutant] = {
    "keeps a scheduler that does not say it is ready": edit(
        supervisor.Supervisor, "_stuck", "self._engine_ready_at == math.inf", "False"
    ),
}
