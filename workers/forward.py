"""The passes of a step, before and after sampling: eager, or as replays of CUDA graphs.

Which way a step goes is decided here. Decode steps that `graphs.py` covers are whole graphs. Steps
with few prompt tokens are cut at each attention (`layer_graphs.py`). All others run eagerly.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.attention.flashinfer_mla import flashinfer_decode
from ..shared.config import ServeConfig
from ..shared.messages import StepPlan
from .drafts import Drafter
from .graphs import DecodeGraphs, capturing
from .inputs import (
    Backends,
    SamplingPoints,
    StepBatch,
    StepInputs,
    build_batch,
    decode_batch,
    decode_inputs,
)
from .layer_graphs import LayerGraphs
from .memory.kv_cache import allocate_kv, graph_allowance, measure_peak
from .model.glm4_moe_lite import ModelWeights, compute_logits, hidden_states
from .rows import RowTable


@dataclass(frozen=True)
class Forwarded:
    """A step between its forward pass and its end."""

    logits: Tensor | None  # [num_points, vocab] float32; None: nothing samples, or not this rank
    points: SamplingPoints
    batch: StepBatch | None = None  # None: graphs run this step
    normed: Tensor | None = None  # [num_tokens, hidden], without graphs of the whole step
    hidden: Tensor | None = None  # the same; which the draft layer is fed
    graph_size: int = 0  # rows of the graph that runs this step

    def chunk_states(self) -> list[Tensor]:
        """The final states of each chunk of the plan [its tokens, hidden]."""
        if self.batch is None or self.batch.packed is None or self.normed is None:
            return []
        return [self.normed[span] for span in self.batch.packed.chunk_spans]


class Forward:
    """The main model and the draft layer of one rank, and the KV pages that they write."""

    def __init__(self, model: ModelWeights, config: ServeConfig, table: RowTable) -> None:
        self.model, self.table = model, table
        self.decode_graphs: DecodeGraphs | None = None
        self.layer_graphs: LayerGraphs | None = None
        self.drafter: Drafter | None = None
        self._config = config
        prefill, decode = config.llm_prefill_att_backend[0], config.llm_decode_att_backend[0]
        if config.mtp_mode is not None:
            assert model.nextn is not None, "weights were loaded without the draft layer"
            self.drafter = Drafter(model.nextn, config, table)
        spec, heads = model.spec, model.layers[0].attention.kv_b.shape[0]
        planned = flashinfer_decode(
            decode if self.drafter is None else "auto",  # drafts have several queries
            table.page_table,
            config.page_size,
            model.embedding.new_empty(0, heads, spec.latent_dim),
            spec.kv_lora_rank,
            spec.softmax_scale,
        )
        self._backends = Backends(prefill, decode, planned)
        self.allocate_pages(1)

    def allocate_pages(self, num_pages: int) -> None:
        """Replace the KV pages by `num_pages` of the scheduler's and a scratch page."""
        self.num_pages = num_pages
        self.kv = torch.empty(0)  # gives the old pages back first
        dtype = self.model.embedding.dtype
        self.kv = allocate_kv(num_pages + 1, self.model.spec, self._config, dtype)
        self.table.set_scratch_page(num_pages)

    def before_sampling(self, plan: StepPlan) -> Forwarded:
        """Run the main model for a plan whose row changes have been applied. Raises ValueError as
        `build_batch` does."""
        if self.decode_graphs is not None and not plan.prefill:
            padded = self.decode_graphs.padded(plan.decode, plan.num_drafts)
            if padded is not None:
                return self._replay(self.decode_graphs, plan, padded)
        batch = build_batch(plan, self.table, self._backends)
        if self._backends.planned is not None:
            self._plan_attention(plan.decode)
        normed, raw = self._hidden_states(batch.inputs)
        logits, index = None, batch.sampling_index
        if len(batch.points.rows):
            logits = compute_logits(self.model, normed if index is None else normed[index])
        hidden = normed if self.drafter is None or self.drafter.is_fed_normed else raw
        return Forwarded(logits, batch.points, batch, normed, hidden)

    def after_sampling(self, plan: StepPlan, forwarded: Forwarded, ids: Tensor) -> Tensor | None:
        """Move the rows on by the sampled ids [num_points] int64, and make the next drafts.
        -> with drafts, how many new tokens each decode row has [n] int64; else one each."""
        table, points, batch = self.table, forwarded.points, forwarded.batch
        if self.drafter is not None:
            return self._finish(self.drafter, plan, forwarded, ids)
        if batch is None or batch.packed is None:
            table.advance(points.rows, table.ones[:, : len(ids)])
        else:
            table.advance(batch.packed.rows, batch.packed.added)
        table.last_token[points.rows] = ids
        return None

    def _hidden_states(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        graphs = self.layer_graphs
        if graphs is not None and graphs.covers(len(inputs.token_ids)):
            return graphs.run(inputs, self.kv, self.table.scratch_slot)
        return hidden_states(self.model, inputs, self.kv)

    def _replay(self, graphs: DecodeGraphs, plan: StepPlan, padded: list[int]) -> Forwarded:
        if self.drafter is None:
            for row in plan.decode:
                self.table.check_room(row, 1)
        self._plan_attention(padded)
        logits, points = graphs.replay(padded, len(plan.decode), plan.num_drafts)
        is_first = self.model.ranks.rank == 0
        return Forwarded(logits if is_first else None, points, graph_size=len(padded))

    def _finish(
        self, drafter: Drafter, plan: StepPlan, forwarded: Forwarded, ids: Tensor
    ) -> Tensor:
        if forwarded.batch is not None:
            assert forwarded.hidden is not None
            return drafter.finish(forwarded.batch, forwarded.hidden, self.kv, ids, plan.num_drafts)
        assert self.decode_graphs is not None
        size, num_rows = forwarded.graph_size, len(plan.decode)
        return self.decode_graphs.finish(size, num_rows, plan.num_drafts, ids)

    def _plan_attention(self, rows: Sequence[int]) -> None:
        """FlashInfer divides the work of a step that decodes these rows on the host."""
        planned, counts = self._backends.planned, self.table.min_tokens
        if planned is not None and rows:
            lengths = [counts[row] + 1 if row < len(counts) else 1 for row in rows]
            planned.plan(rows, lengths, self.model.embedding.dtype)

    # --- CUDA graphs ------------------------------------------------------------------------

    def prepare_graphs(self) -> int:
        """Make room for graphs, which are in use once they are captured -> bytes that they will
        take."""
        config, spec, ranks = self._config, self.model.spec, self.model.ranks
        decode = self.decode_graphs = DecodeGraphs(
            self._decode,
            None if self.drafter is None else self._draft,
            self._plan_attention,
            self.table,
            spec.vocab_size,
            min(config.graph_max_batch_size, config.running_max_req_size or 1),
        )
        most_tokens = config.batch_max_tokens or config.max_req_total_len or 1
        layers = self.layer_graphs = LayerGraphs(self.model, most_tokens)

        def run_largest() -> None:
            decode.run_largest()
            layers.run_largest(self.kv)

        run_largest()
        steps = decode.num_steps + len(layers.sizes)
        exchanges = 2 * spec.num_layers + 1 if ranks.size > 1 else 0
        has_drafts = self.drafter is not None
        return graph_allowance(measure_peak(run_largest), steps, has_drafts, exchanges)

    def capture_graphs(self, report: Callable[[int, int], None]) -> None:
        """Capture what `prepare_graphs` made, for the KV pages there are now."""
        assert self.decode_graphs is not None
        assert self.layer_graphs is not None
        with capturing() as pool:
            self.decode_graphs.capture(pool, report)
            self.layer_graphs.capture(pool, self.kv, report)

    @contextlib.contextmanager
    def without_graphs(self, decode: bool = True, layers: bool = True) -> Iterator[None]:
        """Inside the `with` no graphs of decode steps, or of layers, are replayed."""
        graphs = self.decode_graphs, self.layer_graphs
        self.decode_graphs = None if decode else graphs[0]
        self.layer_graphs = None if layers else graphs[1]
        try:
            yield
        finally:
            self.decode_graphs, self.layer_graphs = graphs

    def _decode(
        self, rows: Tensor, num_drafts: int, logits: Tensor
    ) -> tuple[SamplingPoints, Tensor | None]:
        """The captured part of a decode step before sampling, see `graphs.Before`."""
        batch = decode_batch(self.table, rows, num_drafts, self._backends)
        normed, raw = hidden_states(self.model, batch.inputs, self.kv)
        compute_logits(self.model, normed, logits)
        if self.drafter is None:
            return batch.points, None
        return batch.points, normed if self.drafter.is_fed_normed else raw

    def _draft(self, rows: Tensor, num_drafts: int, ids: Tensor, hidden: Tensor) -> Tensor:
        """The captured part of a decode step after sampling, see `graphs.After`."""
        assert self.drafter is not None
        if not num_drafts:
            return self.drafter.accept(rows, ids, 0)
        inputs = decode_inputs(self.table, rows, num_drafts, self._backends)
        return self.drafter.finish_decode(rows, inputs, hidden, self.kv, ids, num_drafts)
