"""Measures tiles on the GPU of this process at start-up and keeps the fastest, for `tiles.py`.

Results are stored in the caller's cache, in a folder for each card and Triton version. Copied to
`configs/<card>`, such a folder comes with the package.
"""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from .tiles import (
    FIELDS,
    Shape,
    Table,
    Tile,
    TileChoice,
    asked,
    card_name,
    current,
    merged,
    read_choices,
    shipped,
    use,
    write_choices,
)

logger = logging.getLogger(__name__)

# Numbers of tokens that are measured. Each stands for all numbers down to the one before it.
TOKENS = {
    "linear_one": (1,),
    "linear_few": (8, 32),
    "moe_one": (1,),
    "moe": (16, 32, 64, 128, 256, 512, 1024, 8192),
}
_L2_BYTES = 150 << 20  # reading so many bytes evicts everything older from the L2 cache
_SECONDS = 50.0  # no measurement begins later; one takes a few seconds, mostly compilation
_REPLAYS = 5

Calls = Callable[[Tile], list[Callable[[], object]]]
Alternatives = tuple[slice, Sequence[Tile]]  # a part of a tile, and values to try for it


def use_stored(level: int, cache: Path) -> None:
    """Before the first step: use the choices stored for this card, in the package and in `cache`;
    at level 3 none, only defaults."""
    use({} if level == 3 else merged(shipped(card_name()), _cached(_folder(cache))))


def tune_asked(level: int, cache: Path, report: Callable[[int, int], None]) -> None:
    """After the first steps: measure the tiles that they asked for, use them and store them in
    `cache`. Level 1 measures those that are not stored, level 2 all, other levels none. Calls
    report(done, total) before each. Takes less than a minute: tiles that are not measured by then
    stay as they are and are measured at the next start."""
    if level not in (1, 2):
        return
    wanted = needs(asked(), {} if level == 2 else current())
    deadline = time.monotonic() + _SECONDS
    new: Table = {}
    for done, (op, shape, num_tokens) in enumerate(wanted):
        report(done, len(wanted))
        choice = tune(op, shape, num_tokens, deadline)
        if choice is not None:
            new.setdefault((op, shape), {})[num_tokens] = choice
    if not wanted:
        return
    count = sum(map(len, new.values()))
    logger.info("tuned %d of %d kernel tiles for %s", count, len(wanted), card_name())
    use(merged(current(), new))
    try:
        write_choices(_folder(cache), merged(_cached(_folder(cache)), new), _versions())
    except OSError as error:
        logger.warning("the tuned tiles cannot be stored: %s", error)


def needs(keys: Sequence[tuple[str, Shape]], table: Table) -> list[tuple[str, Shape, int]]:
    """(op, shape, number of tokens) of the choices that `table` lacks for these keys. A weight that
    is multiplied with one token is also measured with a few."""
    few = [("linear_few", shape) for op, shape in keys if op == "linear_one"]
    return [
        (op, shape, num_tokens)
        for op, shape in sorted({*keys, *few}, key=lambda key: (-list(FIELDS).index(key[0]), key))
        for num_tokens in TOKENS[op]
        if not any(num_tokens <= largest for largest in table.get((op, shape), {}))
    ]


def tune(
    op: str, shape: Shape, num_tokens: int, deadline: float = float("inf")
) -> TileChoice | None:
    """The fastest of the tiles that were tried, on random operands. None if the deadline (of
    `time.monotonic()`) has passed, memory does not suffice, or no tile runs."""
    if time.monotonic() > deadline:
        return None
    try:
        calls = _OPERANDS[op](shape, num_tokens)
        tile = default(op, shape, num_tokens)
        best = TileChoice(tile, _try(op, calls, tile))
        for span, parts in alternatives(op, tile):
            for part in parts:
                tile = replaced(best.tile, span, part)
                if time.monotonic() > deadline:
                    return None
                us = _try(op, calls, tile) if tile != best.tile else best.us
                best = min(best, TileChoice(tile, us), key=lambda choice: choice.us)
    except torch.OutOfMemoryError:
        logger.warning("no memory to tune %s %s", op, shape)
        return None
    return best if best.us < float("inf") else None


def replaced(tile: Tile, span: slice, part: Tile) -> Tile:
    """`tile` with `part` in place of `span`."""
    return (*tile[: span.start], *part, *tile[span.stop :])


def default(op: str, shape: Shape, num_tokens: int) -> Tile:
    """The tile of a kernel where none is stored."""
    from .dense.linear_triton import few_tile, one_tile
    from .moe.experts_triton import ONE_TILE, default_tile

    if op == "moe_one":
        return ONE_TILE
    if op == "moe":
        return default_tile(num_tokens, shape[3], shape[0])
    return one_tile(shape[1]) if op == "linear_one" else few_tile(*shape)


def alternatives(op: str, tile: Tile) -> list[Alternatives]:
    """Values to try for parts of a default tile, one part after the other."""
    if op == "linear_one":
        tiles = [(4, 512, 4), (4, 1024, 4), (4, 2048, 4), (8, 1024, 4), (2, 2048, 4)]
        return [(slice(0, 3), tiles)]
    if op == "linear_few":
        return [(slice(0, 4), [(), (4, 16, 64, 4), (4, 16, 128, 3), (4, 32, 64, 4)])]
    if op == "moe_one":
        first, then = (
            [(2, 2048, 4), (4, 1024, 4), (4, 512, 4)],
            [(2, 512, 2), (4, 512, 8), (8, 512, 4)],
        )
        return [(slice(0, 3), first), (slice(3, 6), then)]
    up, down = slice(1, 5), slice(5, 9)
    if tile[0] == 128:
        wide = [(256, 64, 8, 4), (256, 64, 8, 3), (128, 64, 4, 4)]
        return [(up, [(128, 64, 8, 4), (128, 64, 8, 3), (64, 64, 4, 4)]), (down, wide)]
    few = [(64, 128, 4, 4), (64, 128, 4, 3), (64, 64, 4, 4)]
    return [(up, few), (down, [*few, (128, 128, 8, 4), (128, 64, 4, 4)])]


def _linear_operands(shape: Shape, num_tokens: int) -> Calls:
    n, k_size = shape
    x = _random(num_tokens, k_size)
    weights = _random(_copies(n * k_size), n, k_size)

    def calls(tile: Tile) -> list[Callable[[], object]]:
        from .dense.linear_triton import linear_few, linear_one

        if not tile:
            return [partial(torch_linear, x, weight) for weight in weights]
        run = linear_one if num_tokens == 1 else linear_few
        return [partial(run, x, weight, tile) for weight in weights]

    return calls


def _moe_operands(shape: Shape, num_tokens: int) -> Calls:
    """At least four routings to take in turn. Every token has the last expert, as if it were a
    shared one."""
    num_experts, width, hidden, chosen = shape
    x = _random(num_tokens, hidden)
    out = torch.empty_like(x)
    layers = [
        (_random(num_experts, 2 * width, hidden), _random(num_experts, hidden, width))
        for _ in range(_copies(3 * num_experts * width * hidden))
    ]
    routes = []
    for number in range(max(4, len(layers))):
        order = torch.rand(num_tokens, num_experts, device="cuda")
        order[:, -1] = -1.0
        ids = order.argsort(-1)[:, :chosen].int().contiguous()
        routes.append((ids, torch.rand(ids.shape, device="cuda"), *layers[number % len(layers)]))

    def calls(tile: Tile) -> list[Callable[[], object]]:
        from .moe.experts_triton import moe_grouped, moe_one, split_tile

        if num_tokens == 1:
            return [partial(moe_one, x, *route, tile, out, False) for route in routes]
        configs = split_tile(tile)
        return [partial(moe_grouped, x, *route, configs, out, False) for route in routes]

    return calls


_OPERANDS: dict[str, Callable[[Shape, int], Calls]] = {
    "linear_one": _linear_operands,
    "linear_few": _linear_operands,
    "moe_one": _moe_operands,
    "moe": _moe_operands,
}


def _copies(size: int) -> int:
    """How many weights of `size` elements to take in turn, so that each is read from memory and not
    from the L2 cache."""
    return min(24, 1 + _L2_BYTES // (2 * size))


def _random(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0.0, shape[-1] ** -0.5)


def _try(op: str, calls: Calls, tile: Tile) -> float:
    """Microseconds; infinite for a tile that this GPU or this compiler cannot run."""
    try:
        return _time(calls(tile))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.info("%s cannot have the tile %s: %s", op, tile, reason)
        return float("inf")


def _time(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds per call inside one CUDA graph of all calls; the smallest of some replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    for _ in range(_REPLAYS):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return round(min(times), 2)


def _folder(cache: Path) -> Path:
    return cache / f"{card_name()}-triton-{_versions()['triton']}"


def _versions() -> dict[str, str]:
    import triton

    return {"card": card_name(), "torch": torch.__version__, "triton": triton.__version__}


def _cached(folder: Path) -> Table:
    try:
        return read_choices(folder)
    except (OSError, ValueError) as error:
        logger.warning("stored kernel tiles are ignored: %s", error)
        return {}
