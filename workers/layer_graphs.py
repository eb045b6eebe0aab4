"""CUDA graphs of a decoder layer's parts before and after attention, for steps with few prompt
tokens.

Attention of prompts differs from step to step, in its kernels and in their sizes; everything else
handles each token alone. So a forward pass is cut before and after each attention, and the pieces
between the cuts are captured once per number of tokens. A batch is padded to the captured size:
padding tokens write their latents to the scratch page. A pass launches some 20 kernels a layer,
and up to about two thousand tokens the card is faster than a host that launches them one by one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention.backends import prefill_backend
from ..kernels.attention.rope import RopeAngles
from ..kernels.dense.linear import rms_norm
from .graphs import covering_size
from .inputs import StepInputs
from .model.glm4_moe_lite import ModelWeights, embed
from .model.mla import Projected

_SIZES = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 2048)

# The state between two pieces: residual stream [tokens, hidden] and the angles.
Flow = tuple[Tensor, RopeAngles]


def token_sizes(largest: int) -> list[int]:
    """Numbers of tokens to capture, ascending: the last one is `largest`, or the most that is worth
    capturing."""
    largest = min(largest, _SIZES[-1])
    return [size for size in _SIZES if size < largest] + [largest]


class LayerGraphs:
    """The pieces of one rank's passes over up to `largest` tokens."""

    def __init__(self, model: ModelWeights, largest: int = _SIZES[-1]) -> None:
        self._model = model
        self.sizes = token_sizes(largest)
        largest, spec = self.sizes[-1], model.spec
        new = model.embedding.new_empty
        heads, hidden = model.layers[0].attention.kv_b.shape[0], model.embedding.shape[1]
        # token ids, positions, slots
        self._tokens = torch.zeros(3, largest, dtype=torch.int64, device=model.embedding.device)
        queries, latents = new(largest, heads, spec.qk_head_dim), new(largest, spec.latent_dim)
        self._values = torch.zeros_like(new(largest, heads, spec.v_head_dim))
        # Up-projected in the graph where there are kernels that read the result.
        keys_values = None
        if prefill_backend("auto", queries, spec.v_head_dim) != "torch":
            keys_values = torch.empty_like(queries), torch.empty_like(self._values)
        self._projected = Projected(queries, latents, keys_values)
        self._states = new(2, largest, hidden)
        self._pieces: dict[int, list[torch.cuda.CUDAGraph]] = {}

    def covers(self, num_tokens: int) -> bool:
        """Whether a step of so many tokens has graphs."""
        return bool(self._pieces) and covering_size(self.sizes, num_tokens) is not None

    def run_largest(self, kv: Tensor) -> None:
        """Run the largest pieces eagerly on padding tokens, to measure what they need."""
        self._run_all(self.sizes[-1], kv)

    def capture(self, pool: Any, kv: Tensor, report: Callable[[int, int], None]) -> None:
        """Capture all, largest first. kv [pages, layers, page_size, latent_dim] is what replays
        write to. `report(done, total)` is called after each size."""
        for done, size in enumerate(reversed(self.sizes)):
            self._run_all(size, kv)  # compiles, which a capture must not
            torch.cuda.synchronize()
            flow, pieces = None, []
            # A piece's stream stays in the pool's memory until the next piece has been captured,
            # and the one after that may reuse it: replays come in the same order.
            for number in range(len(self._model.layers) + 1):
                pieces.append(torch.cuda.CUDAGraph())
                with torch.cuda.graph(pieces[-1], pool=pool):
                    flow = self._piece(size, number, flow, kv)
            self._pieces[size] = pieces
            report(done + 1, len(self.sizes))

    def run(self, inputs: StepInputs, kv: Tensor, scratch_slot: int) -> tuple[Tensor, Tensor]:
        """`hidden_states` of a step of up to `largest` tokens; valid until the next run."""
        count = len(inputs.token_ids)
        size = covering_size(self.sizes, count)
        assert size is not None, "see `covers`"
        for line, column in zip(
            self._tokens, (inputs.token_ids, inputs.positions, inputs.slots), strict=True
        ):
            line[:count] = column
        self._tokens[2, count:size] = scratch_slot
        pieces = self._pieces.get(size)
        tokens, values = self._projected.cut(slice(0, count)), self._values[:count]
        flow = None
        for number in range(len(self._model.layers) + 1):
            if number:
                layer = self._model.layers[number - 1]
                layer.attend(tokens, inputs.groups, kv[:, number - 1], values)
            if pieces is None:
                flow = self._piece(size, number, flow, kv)
            else:
                pieces[number].replay()
        normed, raw = self._states[:, :count]
        return normed, raw

    def _run_all(self, size: int, kv: Tensor) -> None:
        flow = None
        for number in range(len(self._model.layers) + 1):
            flow = self._piece(size, number, flow, kv)

    def _piece(self, size: int, number: int, flow: Flow | None, kv: Tensor) -> Flow | None:
        """Everything between the attentions of layers `number` - 1 and `number`."""
        model = self._model
        token_ids, positions, slots = self._tokens[:, :size]
        if flow is None:
            stream, angles = embed(model, token_ids, positions)
        else:
            stream, angles = flow
            model.layers[number - 1].after_attention(stream, self._values[:size])
        if number == len(model.layers):
            normed = rms_norm(stream, model.norm, model.spec.rms_norm_eps)
            torch.stack((normed, stream), out=self._states[:, :size])
            return None
        out = self._projected.cut(slice(0, size))
        model.layers[number].before_attention(stream, slots, angles, kv[:, number], out)
        return stream, angles
