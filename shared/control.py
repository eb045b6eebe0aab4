"""Messages about the processes themselves: starting, being well, ending. Those that a request meets
are in `messages.py`, which knows all. Each docstring says sender -> receiver and when."""

import msgspec

PROTOCOL_VERSION = 1


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Base of everything that may be a whole message on a socket."""


class Part(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of a piece inside a message."""


class Hello(Message, frozen=True):
    """Every process -> launcher and scheduler, first of all. A mismatch refuses to start."""

    role: str  # "frontend" | "scheduler" | "worker"
    index: int  # frontend number or TP rank; 0 for the scheduler
    pid: int
    config_hash: str
    protocol: int = PROTOCOL_VERSION


class Progress(Message, frozen=True):
    """Any process -> launcher while starting: what it is doing, for the progress display. Then
    from a frontend every second: its event loop runs."""

    role: str
    index: int
    stage: str
    done: int = 0
    total: int = 0


class Ready(Message, frozen=True):
    """Worker -> scheduler and launcher when it can run plans; scheduler -> frontends and launcher
    when all workers can; frontend -> launcher when the port is open.

    `num_pages` is what this worker can hold (the scheduler uses the smallest); from the scheduler
    it is the settled capacity, and `max_req_total_len` the settled longest request in tokens.
    `epoch` numbers the incarnation of the worker group.
    """

    role: str
    index: int
    epoch: int = 0
    num_pages: int = 0
    max_req_total_len: int = 0


STEP_SECONDS = tuple(0.0015 * 1.5**k for k in range(35))  # bounds of the buckets of StepTimes
BATCH_SIZES = tuple(range(1, 129))  # bounds of Heartbeat.batch_sizes


class StepTimes(Part, frozen=True):
    """How long the steps of one kind took, since the scheduler started."""

    counts: list[int] = []  # steps per bucket, one more bucket than STEP_SECONDS; empty: none
    total_s: float = 0.0


class Heartbeat(Message, frozen=True):
    """Scheduler -> frontends and launcher, every second and never from a timer thread.

    `steps` is a progress counter: work in flight with an unchanged counter means a stall.
    The rest is what `/token_load`, `/health` and `/metrics` show.
    """

    steps: int
    num_running: int
    num_waiting: int
    num_paused: int
    pages_total: int
    pages_free: int  # free list, without evictable prefix-cache pages
    pages_cached: int  # held by the prefix cache alone, evictable
    worker_ready: bool
    preemptions: int
    prefix_queries: int  # prompt tokens looked up, cumulative
    prefix_hits: int  # of these found, cumulative
    generated_tokens: int  # cumulative
    malformed_messages: int
    estimated_peak_tokens: int = 0
    step_us: float = 0.0  # mean time of one scheduling step
    prefill_steps: StepTimes = StepTimes()  # steps with prompt chunks
    decode_steps: StepTimes = StepTimes()  # the others
    batch_sizes: list[int] = []  # plans per bucket of rows, one more than BATCH_SIZES; empty: none
    batch_rows: int = 0  # rows of all plans
    draft_length: int = 0  # drafts per row in the last plan
    decoded_rows: int = 0  # decode rows of all answered plans, cumulative
    drafts_offered: list[int] = []  # by position, cumulative
    drafts_accepted: list[int] = []  # of these, in the same order


class PeerLost(Message, frozen=True):
    """Launcher -> the others when a process died: its requests must end or wait.

    frontend `index` lost: the scheduler aborts its requests. worker group lost: the scheduler
    forgets all KV and replays running requests once the next epoch is ready. scheduler lost:
    frontends end all their streams with an error.
    """

    role: str
    index: int
    reason: str
    epoch: int = -1  # of the lost worker group; -1: the one in use


class Shutdown(Message, frozen=True):
    """Launcher -> all. `drain_s` > 0: refuse new requests, finish running ones within that time.
    `drain_s` == 0: stop now."""

    drain_s: float
