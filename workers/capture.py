"""CUDA graphs of a rank that is getting ready: which there are, what they take, their capture.

What a graph holds is in `graphs.py` (decode steps) and `layer_graphs.py` (all others).
"""

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..shared.config import ServeConfig
from .graphs import DecodeGraphs
from .inputs import decode_inputs
from .layer_graphs import LayerGraphs
from .memory.kv_cache import graph_allowance, measure_peak
from .model.glm4_moe_lite import compute_logits, hidden_states
from .mtp import Places
from .runner import ModelRunner

_log = logging.getLogger(__name__)


def prepare_graphs(runner: ModelRunner, config: ServeConfig) -> int:
    """Graphs for the runner, in use once they are captured -> bytes that they will take."""
    graphs = runner.graphs = _decode_graphs(runner, config)
    most_tokens = config.batch_max_tokens or config.max_req_total_len or 1
    layers = runner.layer_graphs = LayerGraphs(runner.model, most_tokens)

    def run_largest() -> None:
        graphs.run_largest()
        layers.run_largest(runner.kv)

    run_largest()
    steps = graphs.num_steps + len(layers.sizes)
    exchanges = 2 * runner.spec.num_layers + 1 if runner.ranks.size > 1 else 0
    has_drafts = config.mtp_mode is not None
    return graph_allowance(measure_peak(run_largest), steps, has_drafts, exchanges)


def capture_graphs(runner: ModelRunner, report: Callable[[int, int], None]) -> None:
    """Capture what `prepare_graphs` made, for the KV pages there are now."""
    graphs, layers = runner.graphs, runner.layer_graphs
    assert graphs is not None
    assert layers is not None
    with _captures() as pool:
        graphs.capture(pool, report)
        layers.capture(pool, runner.kv, report)


def _decode_graphs(runner: ModelRunner, config: ServeConfig) -> DecodeGraphs:
    table, drafting, model, spec = runner.table, runner.drafting, runner.model, runner.spec
    backend = config.llm_decode_att_backend[0]

    def decode(rows: Tensor, num_drafts: int, logits: Tensor) -> tuple[Tensor, Places] | None:
        if drafting is not None:
            state = drafting.state(runner.num_pages)
            return drafting.verify(rows, num_drafts, state, runner.kv, logits)
        if not torch.cuda.is_current_stream_capturing():  # a graph keeps what was planned last
            runner.plan_attention([table.scratch_row] * len(rows))
        inputs = decode_inputs(rows, table, backend, runner.planned)
        hidden, _ = hidden_states(model, inputs, runner.kv)
        compute_logits(model, hidden, logits)
        table.lengths.index_add_(0, rows, torch.ones_like(rows))
        table.lengths[table.scratch_row :].zero_()
        return None

    def finish(rows: Tensor, num_drafts: int, ids: Tensor, hidden: Tensor) -> Tensor:
        assert drafting is not None
        state = drafting.state(runner.num_pages)
        return drafting.finish(rows, num_drafts, ids, hidden, state, runner.kv)

    return DecodeGraphs(
        decode,
        finish if drafting is not None else None,
        table.scratch_row,
        spec.vocab_size,
        min(config.graph_max_batch_size, config.running_max_req_size or 1),
        config.mtp_step if drafting is not None else 0,
        table.device,
    )


@contextlib.contextmanager
def _captures() -> Iterator[Any]:
    """Makes graphs: gives the memory pool that all of them share, since only one runs at a time."""
    started = time.monotonic()
    free, _ = torch.cuda.mem_get_info()
    gc.collect()
    gc.freeze()  # each capture collects garbage, and there is much to look through
    try:
        yield torch.cuda.graph_pool_handle()
    finally:
        gc.unfreeze()
    torch.cuda.synchronize()
    taken = free - torch.cuda.mem_get_info()[0]
    seconds = time.monotonic() - started
    _log.info("captured CUDA graphs in %.1f s, %.2f GB", seconds, taken / 1e9)
