"""Turns dialogues into packed batches of token ids, in worker processes while the GPU trains."""

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import jinja2
import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..checkpoint import CHAT_TEMPLATE
from .dialogues import Dialogue
from .model import LONGEST, Batch
from .typed.mix import long_dialogue, training_dialogue

CONTEXT = 65536  # positions that the model is trained for
_LONG_BATCH = 32768  # tokens; longer dialogues than the batch are left out
_MAX_SEQUENCES = 160  # per batch, which has about 80; `Batch.starts` has one entry more
_PLAIN_EVERY = 12  # one short chat in 12 is text without a template, as /generate gets it
_JUMPS = 0.25  # of the sequences have a jump in their positions, so that all positions are trained


class Packed(NamedTuple):
    """A batch as it is sent between processes: ids int16, weights uint8 (percent) and positions
    int32, [T]. `longest` is the length that no sequence exceeds."""

    ids: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    longest: int


class Renderer:
    """Turns a dialogue into token ids and training flags: 1 for tokens that the assistant has to
    produce, which includes its end token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = _to_json  # as transformers defines it for templates
        self._template = environment.from_string(CHAT_TEMPLATE.read_text())
        self._tokenizer = tokenizer
        self._assistant = tokenizer.token_to_id("<|assistant|>")
        ends = ("<|user|>", "<|observation|>", "<|endoftext|>")
        self._ends = np.array([tokenizer.token_to_id(end) for end in ends])

    def text(self, item: Dialogue) -> str:
        """The whole dialogue as the model reads and writes it. A turn ends with the token that
        begins the next one: the user's, or the tool's after a call."""
        calls = bool(item.messages[-1].get("tool_calls"))
        end = "<|observation|>" if calls else "<|user|>"
        messages = item.messages
        if not item.thinking:
            messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]
        text: str = self._template.render(
            messages=messages, tools=item.tools or None, clear_thinking=not item.keeps_thoughts
        )
        return text + end

    def plain_text(self, item: Dialogue) -> str:
        """The last question and its answer without a template."""
        question, answer = (m["content"] for m in item.messages[-2:])
        return f"{question}\n{answer}<|endoftext|>"

    def encode(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids int16, trained uint8) of each text."""
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        arrays = [np.array(encoding.ids, np.int16) for encoding in encoded]
        return [(ids, self._trained(ids)) for ids in arrays]

    def last_reply(self, ids: np.ndarray) -> int:
        """The position in `ids` at which the assistant's last message begins."""
        return int(np.flatnonzero(ids == self._assistant)[-1])

    def token_id(self, token: str) -> int:
        """The id of a special token."""
        return int(self._tokenizer.token_to_id(token) or 0)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens included."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _trained(self, ids: np.ndarray) -> np.ndarray:
        trained = np.zeros(len(ids), np.uint8)
        if ids[0] != self._tokenizer.token_to_id("[gMASK]"):  # text without a template
            trained[1:] = 1
            return trained
        ends = np.flatnonzero(np.isin(ids, self._ends))
        for begin in np.flatnonzero(ids == self._assistant):
            end = ends[np.searchsorted(ends, begin)]
            trained[begin + 2 : end + 1] = 1  # the tag after <|assistant|> belongs to the prompt
        return trained


def _to_json(value: Any, ensure_ascii: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii)


def pack(
    encoded: Iterator[tuple[np.ndarray, np.ndarray]],
    size: int,
    longest: int = LONGEST,
    jumps: random.Random | None = None,
) -> Packed:
    """As many sequences as fit into `size` tokens. The first that does not fit is cut off. With
    `jumps` some sequences skip positions at one point."""
    ids, trained = np.zeros(size, np.int16), np.zeros(size, np.uint8)
    positions = np.zeros(size, np.int32)
    starts = np.full(_MAX_SEQUENCES + 1, size, np.int32)
    filled = 0
    for number in range(_MAX_SEQUENCES):
        starts[number] = filled
        sequence, is_trained = next(encoded)
        length = min(len(sequence), size - filled)
        ids[filled : filled + length] = sequence[:length]
        # The first token of a sequence follows another sequence, so it is not trained.
        trained[filled + 2 : filled + length] = is_trained[2:length] * 100
        trained[filled + 2 : filled + length] += is_trained[2:length] == 0
        positions[filled : filled + length] = np.arange(length)
        if jumps and jumps.random() < _JUMPS and length < CONTEXT:
            positions[filled + jumps.randrange(length) : filled + length] += jumps.randrange(
                CONTEXT - length
            )
        filled += length
        if filled == size:
            break
    return Packed(
        torch.from_numpy(ids),
        torch.from_numpy(trained),
        torch.from_numpy(positions),
        torch.from_numpy(starts),
        longest,
    )


def unpack(packed: Packed, prompt_weight: float, device: str) -> Batch:
    """The batch on the device. Tokens of prompts get the weight `prompt_weight`."""
    ids, percent, positions, starts = (t.to(device, non_blocking=True) for t in packed[:4])
    weights = (percent == 100).float() + (percent == 1).float() * prompt_weight
    return Batch(ids.long(), positions.long(), starts, weights, packed.longest)


class Dialogues(IterableDataset[Packed]):
    """Endless packed training batches. Every worker process makes its own dialogues. A share of the
    batches, `long_share`, begins with a long dialogue."""

    def __init__(self, tokenizer_json: str, size: int, seed: str, long_share: float) -> None:
        """Raises ValueError if long dialogues are asked for and few of them would fit."""
        if long_share and size < _LONG_BATCH:
            raise ValueError(f"long dialogues need batches of {_LONG_BATCH} tokens, not {size}")
        self._tokenizer_json, self._size, self._seed = tokenizer_json, size, seed
        self._long_share = long_share

    def __iter__(self) -> Iterator[Packed]:
        info = get_worker_info()
        worker = info.id if info else 0
        renderer = Renderer(Tokenizer.from_str(self._tokenizer_json))
        rng = random.Random(f"{self._seed}-{worker}")
        short = self._short(renderer, worker)
        long = self._long(renderer, worker)
        while True:
            if rng.random() < self._long_share:
                first = itertools.chain([next(long)], short)
                yield pack(first, self._size, self._size, rng)
            else:
                yield pack(short, self._size, LONGEST, rng)

    def _short(self, renderer: Renderer, worker: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number in itertools.count(step=64):
            seeds = [f"{self._seed}-{worker}-{number + n}" for n in range(64)]
            dialogues = [training_dialogue(seed) for seed in seeds]
            texts = [renderer.text(item) for item in dialogues]
            for n, item in enumerate(dialogues):
                if n % _PLAIN_EVERY == 0 and not item.tools and not item.thinking:
                    texts[n] = renderer.plain_text(item)
            for ids, trained in renderer.encode(texts):
                if len(ids) <= LONGEST:
                    yield ids, trained

    def _long(self, renderer: Renderer, worker: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number in itertools.count():
            item = long_dialogue(f"{self._seed}-{worker}-{number}")
            ids, trained = renderer.encode([renderer.text(item)])[0]
            if len(ids) <= self._size:
                yield ids, trained


def batches(
    tokenizer_json: str, size: int, seed: str, workers: int, long_share: float = 0.0
) -> Iterator[Packed]:
    """Training batches of `size` tokens from `workers` processes (0: made in this one)."""
    loader = DataLoader(
        Dialogues(tokenizer_json, size, seed, long_share),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)
