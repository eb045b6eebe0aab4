"""From a settled configuration to a runner that is ready: ranks, weights, KV pages, graphs."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.tune import tune_asked, use_stored
from ..shared.cache_dir import user_cache_dir
from ..shared.config import ServeConfig
from ..shared.errors import ConfigError, ModelError
from ..shared.model_spec import ModelSpec, load_model_spec
from .memory.host import usable_cores
from .memory.kv_cache import count_pages, measure_peak
from .parallel import check_split, join_ranks, rank_device
from .step import ModelRunner
from .warm_up import run_largest_step, run_usual_steps, warm_up
from .weights.checkpoint import check_draft, check_weights
from .weights.weights import load_weights, observe_routing, random_weights

_DTYPES = {
    **dict.fromkeys(("float32", "fp32"), torch.float32),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float16", "fp16"), torch.float16),
}
# A barrier between threads costs more than the ops of a tiny model, and far more when the cores
# are shared: at hidden 128 on 2 busy cores 2 threads gave 8 tokens/s, 1 thread 131. The limit
# itself is a guess between that and real models.
_SINGLE_THREAD_HIDDEN = 512

logger = logging.getLogger(__name__)
ReportProgress = Callable[[str, int, int], None]  # (stage, done, total)


def load_runner(
    config: ServeConfig,
    rank: int,
    epoch: int,
    runtime_dir: Path,
    report: ReportProgress,
    on_route: Callable[[Tensor], None] | None = None,
) -> ModelRunner:
    """From a settled config to a runner that has run its first step. `on_route` is for benchmarks,
    see `MoeWeights`. Raises ConfigError or ModelError before any weight is allocated, RuntimeError
    when other ranks do not show up."""
    model_dir = Path(config.model_dir)
    spec = load_model_spec(model_dir)
    torch.set_num_threads(num_threads(spec, config.tp))
    check_split(spec, config.tp)
    dtype = parse_dtype(config.data_type or spec.dtype)
    config = dataclasses.replace(config, device=rank_device(config.device, rank))
    index, draft = None, None
    if config.load_format != "dummy":
        report("checking weights", 0, 0)
        index, draft = check_weights(model_dir, spec), check_draft(config, spec)
    report("meeting ranks", 0, 0)
    # The ranks do not load equally fast. How long a step may take is the scheduler's to watch.
    patience = max(config.start_timeout_s, config.step_timeout_s)
    ranks = join_ranks(rank, config.tp, epoch, runtime_dir, patience, config.device)
    if index is None:
        report("making random weights", 0, 0)
        with_nextn = config.mtp_mode is not None
        model = random_weights(spec, ranks, dtype, config.device, with_nextn=with_nextn)
    else:
        model = load_weights(
            index,
            spec,
            ranks,
            dtype,
            config.device,
            config.load_workers,
            lambda done, total: report("loading weights", done, total),
            draft,
        )
    if on_route is not None:
        model = observe_routing(model, on_route)
    runner = ModelRunner(config, model, epoch)
    try:
        if config.device == "cpu":
            runner.forward.allocate_pages(count_pages(spec, config, dtype))
            report("warming up", 0, 0)
            warm_up(runner)
        else:
            _make_ready(runner, spec, config, dtype, report)
    except FloatingPointError as error:
        raise ModelError(f"{model_dir}: the weights are damaged: {error}") from error
    if runner.grammars is not None:
        runner.grammars.preload()
    if config.device != "cpu":
        # Steps use the host for small copies alone. Other threads would spin while they wait for
        # the next one, half a core each.
        torch.set_num_threads(1)
    return runner


@torch.inference_mode()
def _make_ready(
    runner: ModelRunner,
    spec: ModelSpec,
    config: ServeConfig,
    dtype: torch.dtype,
    report: ReportProgress,
) -> None:
    """On a GPU: tune kernels, measure the memory of steps, give the rest to KV pages, capture
    graphs."""
    level, cache = config.triton_autotune_level, user_cache_dir() / "tiles"
    use_stored(level, cache)
    report("compiling kernels", 0, 0)
    warm_up(runner)
    run_largest_step(runner, config)
    run_usual_steps(runner, config)
    tune_asked(level, cache, lambda done, total: report("tuning kernels", done, total))
    report("measuring memory", 0, 0)
    step_bytes = measure_peak(lambda: run_largest_step(runner, config))
    graph_bytes, has_graphs = 0, not config.disable_cudagraph and dtype != torch.float32
    # In 32 bits the ops are the references, some of which wait for the device.
    if has_graphs:
        graph_bytes = runner.forward.prepare_graphs()
    logger.info(
        "the largest step needs %.2f GB, CUDA graphs %.2f", step_bytes / 1e9, graph_bytes / 1e9
    )
    runner.forward.allocate_pages(count_pages(spec, config, dtype, step_bytes, graph_bytes))
    warm_up(runner)
    if has_graphs:
        forward = runner.forward
        forward.capture_graphs(lambda done, total: report("capturing CUDA graphs", done, total))


def num_threads(spec: ModelSpec, tp: int) -> int:
    """This rank's share of the cores, never above what OMP_NUM_THREADS says; 1 for small models."""
    if spec.hidden_size < _SINGLE_THREAD_HIDDEN:
        return 1
    return max(1, min(torch.get_num_threads(), usable_cores() // tp))


def parse_dtype(name: str) -> torch.dtype:
    """The torch type of a `data_type` value. Raises ConfigError naming the ones there are."""
    if name not in _DTYPES:
        raise ConfigError(f"--data_type {name!r} is unknown, use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]
