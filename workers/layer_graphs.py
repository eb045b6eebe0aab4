"""CUDA graphs of what lies between attentions, for steps with few prompt tokens.

Attention of prompts differs from step to step, in its kernels and in their sizes; everything else
looks at tokens one by one. So a forward pass is cut before and behind each attention, and the
pieces are captured once per number of tokens: what is missing is filled up with tokens of nobody,
whose KV goes to the scratch page. A pass launches some 20 kernels a layer, and up to about two
thousand tokens the card is faster than a host that launches them one by one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention.up_project import up_project
from ..kernels.backends import prefill_backend
from ..kernels.dense.rms_norm import rms_norm
from ..shared.model_spec import ModelSpec
from .inputs import StepInputs
from .model.glm4_moe_lite import ModelWeights, embed
from .model.mla import add_output, attend, project
from .model.moe import mlp
from .parallel import Ranks

_SIZES = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 2048)

# What one piece leaves for the next: residual stream [tokens, hidden] and the angles.
Flow = tuple[Tensor, tuple[Tensor, Tensor]]


class LayerGraphs:
    """The pieces of one rank's passes over up to `largest` tokens."""

    def __init__(
        self, model: ModelWeights, spec: ModelSpec, ranks: Ranks, largest: int = _SIZES[-1]
    ) -> None:
        self._model, self._spec, self._ranks = model, spec, ranks
        largest = min(largest, _SIZES[-1])
        self.sizes = [size for size in _SIZES if size < largest] + [largest]
        new = model.embedding.new_empty
        heads, hidden = model.layers[0].attention.kv_b.shape[0], model.embedding.shape[1]
        # token ids, positions, slots
        self._tokens = torch.zeros(3, largest, dtype=torch.int64, device=model.embedding.device)
        self._queries = new(largest, heads, spec.qk_head_dim)
        self._latents = new(largest, spec.latent_dim)
        self._values = torch.zeros_like(new(largest, heads, spec.v_head_dim))
        # Keys and values of the tokens themselves, where there are kernels that read them.
        self._own: tuple[Tensor, Tensor] | None = None
        if prefill_backend("auto", self._queries, spec.v_head_dim) != "torch":
            self._own = torch.empty_like(self._queries), torch.empty_like(self._values)
        self._states = new(2, largest, hidden)
        self._pieces: dict[int, list[torch.cuda.CUDAGraph]] = {}

    def covers(self, num_tokens: int) -> bool:
        """Whether a step of so many tokens has graphs."""
        return bool(self._pieces) and 0 < num_tokens <= self.sizes[-1]

    def run_largest(self, kv: Tensor) -> None:
        """The largest pieces without graphs, for nobody: to measure what they need."""
        self._run_all(self.sizes[-1], kv)

    def capture(self, pool: Any, kv: Tensor, report: Callable[[int, int], None]) -> None:
        """Capture all, largest first. kv [pages, layers, page_size, latent_dim] is what replays
        write to. `report(done, total)` is called after each size."""
        for done, size in enumerate(reversed(self.sizes)):
            self._run_all(size, kv)  # compiles, which a capture must not
            torch.cuda.synchronize()
            flow, pieces = None, []
            # What a piece leaves is in the pool's memory until the next one has been captured, and
            # the one after that may use it again: replays come in the same order.
            for number in range(len(self._model.layers) + 1):
                pieces.append(torch.cuda.CUDAGraph())
                with torch.cuda.graph(pieces[-1], pool=pool):
                    flow = self._piece(size, number, flow, kv)
            self._pieces[size] = pieces
            report(done + 1, len(self.sizes))

    def run(self, inputs: StepInputs, kv: Tensor, scratch_slot: int) -> tuple[Tensor, Tensor]:
        """`hidden_states` of a step of up to `largest` tokens; valid until the next run."""
        count = len(inputs.token_ids)
        size = next(size for size in self.sizes if size >= count)
        for line, given in zip(
            self._tokens, (inputs.token_ids, inputs.positions, inputs.slots), strict=True
        ):
            line[:count] = given
        self._tokens[2, count:size] = scratch_slot
        pieces = self._pieces.get(size)
        queries, latents, values = (
            part[:count] for part in (self._queries, self._latents, self._values)
        )
        own = None if self._own is None else (self._own[0][:count], self._own[1][:count])
        flow = None
        for number in range(len(self._model.layers) + 1):
            if number:
                kv_b = self._model.layers[number - 1].attention.kv_b
                here = kv[:, number - 1]
                attend(queries, latents, kv_b, inputs.groups, here, self._spec, own, values)
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
        """From behind the attention of layer number - 1 to that of layer `number`."""
        model, spec, ranks = self._model, self._spec, self._ranks
        token_ids, positions, slots = self._tokens[:, :size]
        if flow is None:
            stream, angles = embed(model, token_ids, positions, spec)
        else:
            stream, angles = flow
            layer = model.layers[number - 1]
            add_output(stream, self._values[:size], layer.attention, ranks)
            mlp(stream, layer.mlp_norm, layer.mlp, spec, ranks)
        if number == len(model.layers):
            normed = rms_norm(stream, model.norm, spec.rms_norm_eps)
            torch.stack((normed, stream), out=self._states[:, :size])
            return None
        layer, here = model.layers[number], kv[:, number]
        queries, latents = self._queries[:size], self._latents[:size]
        norm, weights = layer.input_norm, layer.attention
        project(stream, norm, weights, slots, angles, here, spec, latents, out=queries)
        if self._own is not None:
            own = self._own[0][:size], self._own[1][:size]
            up_project(latents, weights.kv_b, spec.qk_nope_head_dim, own)
        return stream, angles
