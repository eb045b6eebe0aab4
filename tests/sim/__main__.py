"""`python -m glimmer.tests.sim --events 2000000`: the simulation until so many events were seen."""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import server_world  # noqa: E402
import world  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=2_000_000)
    parser.add_argument("--first-seed", type=int, default=0)
    args = parser.parse_args()
    started, seed, events = time.monotonic(), args.first_seed, 0
    worlds: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    most_preempted = most_overtaken = 0
    while events < args.events:
        core = world.run(seed)
        calm = server_world.run(seed)
        harsh = server_world.run(seed, safety=True)
        events += core.num_events + calm.num_events + harsh.num_events
        worlds.update(("scheduler", "server until at rest", "server amid faults"))
        faults.update(calm.faults + harsh.faults)
        faults["worker groups lost"] += core.losses
        faults["steps failed"] += core.num_failed
        faults["grammars failed"] += core.num_grammar_errors
        faults["requests refused"] += core.checks.queue.num_refused
        faults["preemptions"] += core.num_preemptions
        most_preempted = max(most_preempted, core.checks.order.most_preempted)
        most_overtaken = max(most_overtaken, core.checks.order.most_overtaken)
        seed += 1
    took = time.monotonic() - started
    print(f"{sum(worlds.values())} worlds, {events} events, {took:.0f} s; {dict(worlds)}")
    print(f"most preemptions of a request: {most_preempted}; overtaken by: {most_overtaken}")
    for kind, count in sorted(faults.items()):
        print(f"{count:8} {kind}")


main()
