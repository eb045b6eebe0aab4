"""Every message between processes: first those of a request, in the order in which it meets them,
then those about the processes themselves.

On the wire a message is a MessagePack array. Its first item is the name of the type (see
`transport.py`). New fields are appended at the end, with a default. A change of meaning raises
`PROTOCOL_VERSION`. Each docstring says sender -> receiver, and when the message is sent.

    launcher    frontend            scheduler              worker ranks
                   -- Submit, Abort ->
                                       -- StepPlan (same bytes to every rank) ->
                                       <- StepResult (rank 0) --
                   <- Tokens, Finished --
       <- Hello, Progress, Ready, Heartbeat from all
       <- Counts from frontends, LauncherBeat to them ->
       PeerLost, Shutdown to all ->
"""

import msgspec

from .sampling import SamplingParams

PROTOCOL_VERSION = 2


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages."""


class Part(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of structs that are fields of messages."""


# --- a request arrives ----------------------------------------------------------------------


class Grammar(Part, frozen=True):
    """A grammar that an output must match. A frontend has checked it; worker rank 0 follows it.

    `text` is what llguidance reads: a Lark grammar, or its JSON form. `field` is the client's field
    that asked for it, for errors. The output must match after token `start_id` has come (-1: from
    its first token). Before that, the tokens of `banned_ids` and the stop tokens are not allowed.
    """

    text: str
    field: str = ""
    start_id: int = -1
    banned_ids: tuple[int, ...] = ()


class Submit(Message, frozen=True):
    """Frontend -> scheduler: generate one sequence. Answered by exactly one `Finished`."""

    request_id: int  # 62 random bits, so unique even when a frontend restarts
    frontend: int  # index of the frontend that gets Tokens and Finished
    prompt_ids: list[int]
    sampling: SamplingParams
    use_prefix_cache: bool = True
    cache_salt: str = ""  # prefixes are shared only between equal salts
    priority: int = 0  # lower runs earlier; equal priorities run in order of arrival
    timeout_s: float = 0.0  # longest time in the queue; 0: the server's default
    grammar: Grammar | None = None
    tenant: str = ""  # users (names of API keys) get equal shares; "": without keys


class Abort(Message, frozen=True):
    """Frontend -> scheduler: end these requests now (the client left, or a stop string was seen).
    Unknown ids are ignored: the request may just have finished."""

    request_ids: list[int]


class AbortNamed(Message, frozen=True):
    """Frontend -> other frontends: end the HTTP request whose X-Request-Id is `name`."""

    name: str  # "": all requests
    tenant: str | None = None  # of these only the requests of one tenant


class FlushCache(Message, frozen=True):
    """Frontend -> scheduler: drop all cached prefixes that no running request uses."""


# --- one step -------------------------------------------------------------------------------


class RowAdmit(Part, frozen=True):
    """A request takes row `row` of the worker's tables. Old contents of the row are overwritten.

    `pages` is the page table so far. The first `num_cached_tokens` positions already hold KV. A
    resumed request has `num_output_tokens` > 0, and `counted_ids` includes these outputs.
    """

    row: int
    sampling: SamplingParams
    pages: list[int]
    num_cached_tokens: int
    num_output_tokens: int
    counted_ids: list[int]  # tokens that penalties count; empty unless sampling.uses_penalties
    grammar: Grammar | None = None
    output_ids: list[int] = []  # the outputs so far, with a grammar or a thinking budget


class PagesAppended(Part, frozen=True):
    """Pages to append to a row's page table."""

    row: int
    pages: list[int]


class PrefillChunk(Part, frozen=True):
    """Consecutive known tokens of one row. The step writes the KV of each.

    `sample`: the chunk ends at the last known token, so the next token is sampled.
    `next_id` is the known token after the chunk (-1 if `sample`); draft layers need it.
    """

    row: int
    start: int  # position of token_ids[0]; equals the row's length so far
    token_ids: list[int]
    sample: bool
    next_id: int = -1


# Most tokens of a step with drafts: rows x (drafts + 1). The logits of all are kept, 620 KB each at
# full size, and CUDA graphs are captured up to this number.
MAX_DRAFT_TOKENS = 1024


class StepPlan(Message, frozen=True):
    """Scheduler -> every worker rank: the next step, as changes to the row tables.

    Apply `freed`, `admitted` and `appended` in this order. Then run prefill chunks and decode rows
    in one forward pass. The input of a decode row is the last token sampled for the row, at the
    row's length. Plans are run strictly in order. The next plan may arrive before the result of
    this one was read.

    With `num_drafts` > 0, each decode row verifies that many drafts of its own after its last
    token, and each sampling row makes that many drafts for its next step. A draft whose position
    has no page is never accepted, so the row's length (tokens with KV) stays within its pages.
    """

    epoch: int
    step: int
    freed: list[int]
    admitted: list[RowAdmit]
    appended: list[PagesAppended]
    prefill: list[PrefillChunk]
    decode: list[int]
    num_drafts: int = 0


class TokenLogprob(Part, frozen=True):
    """Log-probability of a token and its rank (1: the likeliest). `top` holds (id, logprob) pairs,
    likeliest first. As in LightLLM, values are after penalties and temperature and before top-k and
    top-p. -inf is sent as -9999.0."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class RowResult(Part, frozen=True):
    """The tokens that one sampling row produced: one, and the drafts that were accepted.
    `logprobs` is parallel to `token_ids`, or empty if none were asked for.

    With an `error`, the row's grammar exceeded a limit of its library. `token_ids` is empty and the
    request ends as "invalid". Other rows are not concerned."""

    token_ids: list[int]
    logprobs: list[TokenLogprob] = []
    error: str = ""


class StepResult(Message, frozen=True):
    """Worker rank 0 -> scheduler, after each plan, in order.

    `rows` is parallel to the plan's sampling rows: the `prefill` chunks with `sample`, then the
    `decode` rows. `prompt_logprobs` is parallel to the plan's `prefill`, with empty lists where
    none were asked for. Entry i of a chunk's list is about the token at chunk start + i, given all
    tokens before it; position 0 has no entry.

    With an `error`, the row changes were applied but nothing ran (for lack of memory, for example),
    and `rows` is empty. Plans that were sent before the scheduler knew of the error are answered
    too, but these answers are not read.
    """

    epoch: int
    step: int
    rows: list[RowResult]
    prompt_logprobs: list[list[TokenLogprob]] = []
    error: str = ""


# --- tokens go back -------------------------------------------------------------------------


class TokenRow(Part, frozen=True):
    """New tokens of one request."""

    request_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] = []
    prompt_logprobs: list[TokenLogprob] = []


class Tokens(Message, frozen=True):
    """Scheduler -> frontend: all new tokens of this frontend's requests after one step."""

    rows: list[TokenRow]


class Finished(Message, frozen=True):
    """Scheduler -> frontend: exactly one per Submit, after its last Tokens.

    `reason`: "stop" (a stop token, which is the last token sent), "length", "abort", "error" (the
    server's fault: HTTP 500), "overloaded" (queue full or draining: 429 or 503, `retry_after_s` is
    set), "invalid" (can never run, or its grammar became too complex: 400, `field` names the
    parameter), "unavailable" (the workers died: 503).
    """

    request_id: int
    reason: str
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    message: str = ""
    field: str = ""
    retry_after_s: float = 0.0
    queue_s: float = 0.0  # time from Submit until the request started first
    mtp_accepted_tokens: int = 0  # outputs that were accepted drafts
    prefill_s: float = 0.0  # from its first start until its first token
    decode_s: float = 0.0  # from its first token until its end


# --- processes start, run and end -----------------------------------------------------------


class Hello(Message, frozen=True):
    """Every process -> launcher and scheduler, as its first message. A process of another
    configuration or protocol version is refused."""

    role: str  # "frontend" | "scheduler" | "worker"
    index: int  # frontend number or TP rank; 0 for the scheduler
    pid: int
    config_hash: str
    protocol: int = PROTOCOL_VERSION


class Progress(Message, frozen=True):
    """Any process -> launcher while it starts: what it is doing, for the progress display. Later
    from a frontend every second, to show that its event loop runs."""

    role: str
    index: int
    stage: str
    done: int = 0
    total: int = 0


class Ready(Message, frozen=True):
    """Worker -> scheduler and launcher when it can run plans; scheduler -> frontends and launcher
    when all workers can; frontend -> launcher when the port is open.

    `num_pages` is how many pages this worker can hold; the scheduler uses the smallest number.
    From the scheduler, `num_pages` and `max_req_total_len` (in tokens) are the limits that are in
    force. `epoch` numbers the incarnations of the worker group.
    """

    role: str
    index: int
    epoch: int = 0
    num_pages: int = 0
    max_req_total_len: int = 0


STEP_SECONDS = tuple(0.0015 * 1.5**k for k in range(35))  # bounds of the buckets of StepTimes
BATCH_SIZES = tuple(range(1, 129))  # bounds of Heartbeat.batch_sizes
STEP_TOKENS = (1, *(8 << k for k in range(12)))  # bounds of Heartbeat.step_tokens


class StepTimes(Part, frozen=True):
    """Durations of all steps of one kind since the scheduler started."""

    counts: list[int] = []  # steps per bucket, one more bucket than STEP_SECONDS; empty: none
    total_s: float = 0.0


class Heartbeat(Message, frozen=True):
    """Scheduler -> frontends and launcher, every second, from its main loop.

    `steps` shows progress: requests are running and it stays unchanged if the workers hang. The
    other fields are shown by `/token_load`, `/health` and `/metrics`.
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
    dropped_messages: int = 0  # because another process did not read them
    dropped_log_lines: int = 0
    stall: str = ""  # a step that takes far longer than such steps usually do; "": none
    step_tokens: list[int] = []  # plans per bucket of tokens, one more than STEP_TOKENS
    planned_tokens: int = 0  # tokens of all plans
    token_gaps: StepTimes = StepTimes()  # times between two tokens of a row, one for each row


class Counts(Message, frozen=True):
    """Frontend -> launcher, every second and when `/metrics` is read: what this process has counted
    since it started. The launcher answers with a LauncherBeat that includes it. Worker -> launcher
    when it has dropped log lines."""

    role: str
    index: int
    pid: int
    values: list[float]  # of a frontend: see `frontend/engine/tally.py`; of a worker: lines dropped
    serial: int = 0  # repeated in the answer


class GpuState(Part, frozen=True):
    """Health of one GPU. Xid events are those since the server started, errors of its memory (ECC)
    those since the driver was loaded."""

    uuid: str
    is_healthy: bool = True  # False: it needs a reset or a repair
    fatal_xids: int = 0
    application_xids: int = 0  # that a program has caused
    other_xids: int = 0
    last_xid: int = 0
    corrected_ecc: int = 0
    uncorrected_ecc: int = 0


class LauncherBeat(Message, frozen=True):
    """Launcher -> frontends, every second. A launcher that is stopped is noticed by its silence.
    Counts are since the launcher started."""

    engine_restarts: int = 0
    frontend_restarts: int = 0
    dropped_messages: int = 0
    dropped_log_lines: int = 0
    totals: list[float] = []  # Counts of all frontends, added up, also of those that have ended
    serial: int = 0  # of the receiver's last Counts
    stalls: int = 0  # steps that took so long that stacks were logged
    worker_log_lines: int = 0  # dropped by workers
    is_leaving: bool = False  # SIGTERM came; requests are still accepted for `drain_delay_s`
    gpus: list[GpuState] = []  # by rank; empty: they are not watched


class PeerLost(Message, frozen=True):
    """Launcher -> the other processes when one died. Scheduler -> a frontend about itself, when
    messages to it were dropped: its requests are aborted, and it ends their streams.

    A frontend: the scheduler aborts its requests. The worker group: the scheduler forgets all KV,
    and replays running requests when the next group is ready. The scheduler: frontends end all
    their streams with an error.
    """

    role: str
    index: int
    reason: str
    epoch: int = -1  # of the lost worker group; -1: the one in use


class WorkerFailed(Message, frozen=True):
    """Worker -> launcher: this rank cannot go on, and exits. Scheduler -> launcher: the group has
    not answered within `step_timeout_s`, or its answer does not fit. The launcher restarts the
    group and sends `PeerLost` to the scheduler."""

    epoch: int
    rank: int
    reason: str


class Reload(Message, frozen=True):
    """Launcher -> frontends, on SIGHUP: read the files of keys and certificates again."""


class Reloaded(Message, frozen=True):
    """Frontend -> launcher, after a Reload. `problem`: why old contents stay in use; "" if none
    do."""

    index: int
    problem: str = ""


class Shutdown(Message, frozen=True):
    """Launcher -> all processes. `drain_s` > 0: refuse new requests and finish running ones within
    that time. `drain_s` == 0: stop now."""

    drain_s: float


AnyMessage = (
    Submit
    | Abort
    | AbortNamed
    | FlushCache
    | StepPlan
    | StepResult
    | Tokens
    | Finished
    | Hello
    | Progress
    | Ready
    | Heartbeat
    | Counts
    | LauncherBeat
    | PeerLost
    | WorkerFailed
    | Reload
    | Reloaded
    | Shutdown
)
