"""Every message between processes, in the order in which a request meets them.

All are frozen array-like structs: on the wire a message is a MessagePack array whose first item
is the type's name (see `codec.py`). A field is only ever appended; a change of meaning raises
`PROTOCOL_VERSION`. Each docstring says sender -> receiver and when.

    launcher    frontend            scheduler              worker ranks
       <- Hello, Progress, Ready, Heartbeat from all
                   -- Submit, Abort ->
                                       -- LoadGrammar -> <- GrammarLoaded -- (rank 0)
                                       -- StepPlan (same bytes to every rank) ->
                                       <- StepResult (rank 0) --
                   <- Tokens, Finished --
       PeerLost, Shutdown to all ->
"""

import msgspec

from .sampling import SamplingParams

PROTOCOL_VERSION = 1


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Base of everything that may be a whole message on a socket."""


class Part(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of a piece inside a message."""


# --- a request's way in ---------------------------------------------------------------------


class Grammar(Part, frozen=True):
    """What the output of a sequence must match. Made by a frontend, loaded by worker rank 0.

    `path` is the compiled grammar, a file in the runtime directory that stays while a request of
    the frontend uses it; beside it lies the vocabulary it was compiled for. The output is free
    until token `start_id` came (-1: it must match from the first token on); while it is free the
    tokens of `banned_ids` and the stop tokens are not allowed.
    """

    name: str  # equal names are equal grammars
    path: str
    start_id: int = -1
    banned_ids: tuple[int, ...] = ()


class Submit(Message, frozen=True):
    """Frontend -> scheduler: one sequence to generate. Answered by exactly one `Finished`."""

    request_id: int  # random 62 bits: unique over frontend restarts
    frontend: int  # where Tokens and Finished go
    prompt_ids: list[int]
    sampling: SamplingParams
    use_prefix_cache: bool = True
    cache_salt: str = ""  # prefixes are shared only between equal salts
    priority: int = 0  # lower runs earlier; equal is first come, first served
    timeout_s: float = 0.0  # longest time in the queue; 0: the server's default
    grammar: Grammar | None = None


class Abort(Message, frozen=True):
    """Frontend -> scheduler: end these now (client gone, stop string seen). Unknown ids are fine:
    the request may just have finished."""

    request_ids: list[int]


class AbortNamed(Message, frozen=True):
    """Frontend -> the other frontends: end the HTTP request whose X-Request-Id is `name`."""

    name: str  # "": all requests


class FlushCache(Message, frozen=True):
    """Frontend -> scheduler: forget the prefixes that no running request uses."""


# --- one step -------------------------------------------------------------------------------


class RowAdmit(Part, frozen=True):
    """A request takes row `row` of the worker's tables. Overwrites whatever the row held.

    `pages` is the whole page table so far; the first `num_cached_tokens` positions already hold
    KV. `num_output_tokens` > 0 on a resumed request: then `counted_ids` includes those outputs.
    """

    row: int
    sampling: SamplingParams
    pages: list[int]
    num_cached_tokens: int
    num_output_tokens: int
    counted_ids: list[int]  # tokens that penalties count; empty unless sampling.uses_penalties
    grammar: Grammar | None = None  # loaded before (see LoadGrammar)
    matched_ids: list[int] = []  # with a grammar: the outputs so far


class LoadGrammar(Message, frozen=True):
    """Scheduler -> worker rank 0, before any row with `grammar` is admitted: load it beside the
    steps, then say `GrammarLoaded`. Forget those named in `dropped`: no row has them."""

    epoch: int
    grammar: Grammar | None
    dropped: list[str] = []


class GrammarLoaded(Message, frozen=True):
    """Worker rank 0 -> scheduler: rows with this grammar may be admitted now, or, with an
    `error`, cannot be."""

    epoch: int
    name: str
    error: str = ""


class PagesAppended(Part, frozen=True):
    """Pages to add at the end of a row's page table."""

    row: int
    pages: list[int]


class PrefillChunk(Part, frozen=True):
    """Consecutive known tokens of one row to run this step: KV is written for each.

    `sample`: the chunk ends at the last known token, so a next token is sampled.
    `next_id` is the known token after the chunk (-1 when sampling): draft layers need it.
    """

    row: int
    start: int  # position of token_ids[0]; equals the row's length so far
    token_ids: list[int]
    sample: bool
    next_id: int = -1


# Tokens of a step with drafts, rows x (drafts + 1): the logits of all are kept, 620 KB each at full
# size, and CUDA graphs are captured up to here.
MAX_DRAFT_TOKENS = 1024


class StepPlan(Message, frozen=True):
    """Scheduler -> every worker rank: what to run next, as changes to the row tables.

    Apply in this order: freed, admitted, appended; then run prefill chunks and decode rows in one
    forward pass. A decode row's input is the row's own last sampled token at the row's length.
    Plans are run strictly in order; the next one may arrive before this one's result is read.

    `num_drafts` > 0: each decode row verifies so many drafts of its own behind that token, and each
    sampling row makes so many for its next step. A row never accepts a draft whose position lies
    behind its pages, so its length (tokens with KV) stays within them.
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
    """Log-probability of a token and its rank (1 = likeliest); `top` holds (id, logprob) pairs,
    likeliest first. Values are after penalties and temperature, before top-k/top-p, as LightLLM
    reports them; -inf is sent as -9999.0."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class RowResult(Part, frozen=True):
    """What one sampling row produced. More than one token only with accepted drafts.
    `logprobs` is parallel to `token_ids`, or empty if none were asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprob] = []


class StepResult(Message, frozen=True):
    """Worker rank 0 -> scheduler, after each plan, in order.

    `rows` is parallel to the plan's sampling rows: first `prefill` chunks with `sample`, in order,
    then `decode` rows, in order. `prompt_logprobs` is parallel to the plan's `prefill` list (empty
    lists where not asked): entry i of a chunk's list is about the token at chunk start + i, given
    all before it; position 0 has no entry.

    With an `error` the step's row changes were applied, but it ran nothing (no memory, say), and
    `rows` is empty. A plan that was sent before the scheduler heard of it is to be answered in any
    way: nobody reads that.
    """

    epoch: int
    step: int
    rows: list[RowResult]
    prompt_logprobs: list[list[TokenLogprob]] = []
    error: str = ""


class WorkerFailed(Message, frozen=True):
    """Worker -> launcher: this rank cannot go on (it exits right after). Scheduler -> launcher:
    the group has not answered a plan within `step_timeout_s`. The launcher restarts the group and
    tells the scheduler with `PeerLost`."""

    epoch: int
    rank: int
    reason: str


# --- a request's way out --------------------------------------------------------------------


class TokenRow(Part, frozen=True):
    """New tokens of one request."""

    request_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] = []
    prompt_logprobs: list[TokenLogprob] = []


class Tokens(Message, frozen=True):
    """Scheduler -> frontend: everything new for this frontend's requests after one step."""

    rows: list[TokenRow]


class Finished(Message, frozen=True):
    """Scheduler -> frontend: exactly one per Submit, after its last Tokens.

    `reason`: "stop" (a stop token, which is the last token sent), "length", "abort", "error"
    (ours: HTTP 500), "overloaded" (queue full or draining: 429/503, `retry_after_s` set),
    "invalid" (can never fit: 400; `field` names the parameter), "unavailable" (worker lost: 503).
    """

    request_id: int
    reason: str
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    message: str = ""
    field: str = ""
    retry_after_s: float = 0.0
    queue_s: float = 0.0  # time from Submit to first being scheduled
    mtp_accepted_tokens: int = 0  # outputs that were accepted drafts


# --- the processes themselves: starting, being well, ending -----------------------------------


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


AnyMessage = (
    Hello
    | Progress
    | Ready
    | Heartbeat
    | PeerLost
    | Shutdown
    | Submit
    | Abort
    | AbortNamed
    | FlushCache
    | LoadGrammar
    | GrammarLoaded
    | StepPlan
    | StepResult
    | WorkerFailed
    | Tokens
    | Finished
)
