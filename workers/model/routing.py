"""Looks at the routing of a forward pass from outside, for benchmarks: weights that send all
tokens to the same few experts make any engine look fast."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from . import moe

Route = Callable[..., tuple[Tensor, Tensor, Tensor]]


@contextlib.contextmanager
def recorded_routing() -> Iterator[list[Tensor]]:
    """The expert ids [num_tokens, k] of each routing inside the `with`, in the order of layers and
    passes, on the device. Sees passes that run now, not replays of CUDA graphs; one thread only."""
    seen: list[Tensor] = []
    norm_route: Route = vars(moe)["norm_route"]

    def recording(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        normed, ids, scores = norm_route(*args, **kwargs)
        chosen = ids.shape[1] - kwargs.get("num_shared", 0)
        seen.append(ids[:, :chosen].clone())
        return normed, ids, scores

    vars(moe)["norm_route"] = recording
    try:
        yield seen
    finally:
        vars(moe)["norm_route"] = norm_route


def count_distinct(seen: list[Tensor]) -> list[int]:
    """Distinct experts in each of the recorded routings. Waits for the device."""
    return [len(set(ids.flatten().tolist())) for ids in seen]
