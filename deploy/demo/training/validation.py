"""Measures the model on held-out dialogues during training. Nothing is generated: a reply counts as
right if each of its tokens is the most likely one."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .data import Packed, Renderer, pack, unpack
from .dialogues import KINDS, Dialogue, dialogue
from .model import LONGEST, Weights, logits, rms_norm, trunk
from .questions import LONG_TEXT_WORDS, retrieval
from .typed.mix import TYPED_KINDS, typed_dialogue
from .words import Source

# Name -> whether words and frames are held out. "held out" is the result; the others explain it.
SIDES = {
    "held out": (True, True),
    "words held out": (True, False),
    "frames held out": (False, True),
    "nothing held out": (False, False),
}
EARLY_FACT = "early fact"
_MARKS = (
    "<think> </think> <tool_call> </tool_call> <arg_key> </arg_key> <arg_value> </arg_value>"
).split()
_TOGETHER = 64  # dialogues in one pass


@dataclass
class Result:
    """The number of right replies, the special token before each first mistake, and a text about
    each mistake."""

    right: int = 0
    count: int = 0
    marks: Counter[str] = field(default_factory=Counter)
    mistakes: list[str] = field(default_factory=list)


def held_out_dialogues(kind: str, side: str, count: int) -> list[Dialogue]:
    """`count` dialogues of a kind (of KINDS, TYPED_KINDS, or EARLY_FACT) for a side (of SIDES)."""
    words, frames = SIDES[side]
    names = [f"validation-{kind}-{n}" for n in range(count)]
    if kind in TYPED_KINDS:
        return [typed_dialogue(name, words, kind, frames) for name in names]
    if kind != EARLY_FACT:
        return [dialogue(name, words, kind, frames) for name in names]
    dialogues = []
    for name in names:
        source = Source(name, words, frames)
        turn = retrieval(source, LONG_TEXT_WORDS, 0.1)
        messages = [{"role": "system", "content": turn.system}] if turn.system else []
        messages += [
            {"role": "user", "content": turn.user},
            {"role": "assistant", "reasoning_content": turn.thought, "content": turn.answer},
        ]
        dialogues.append(Dialogue(kind, messages, [], source.chance(0.5)))
    return dialogues


@torch.no_grad()
def judge(
    weights: Weights, bias: Tensor, renderer: Renderer, dialogues: list[Dialogue], config: Any
) -> Result:
    """Judge the last reply of each dialogue. Dialogues of more than LONGEST tokens are left out."""
    texts = [renderer.text(item) for item in dialogues]
    encoded = [pair for pair in renderer.encode(texts) if len(pair[0]) <= LONGEST]
    result = Result(count=len(encoded))
    for packed in _packs(renderer, encoded):
        batch = unpack(packed, 0.0, str(bias.device))
        hidden, _ = trunk(weights, bias, batch, config)
        normed = rms_norm(hidden, weights["norm"], config["rms_norm_eps"])
        best = torch.cat([logits(weights, part).argmax(-1) for part in torch.split(normed, 8192)])
        wrong = (best.roll(1) != batch.ids) & (batch.weights > 0)
        starts = packed.starts.tolist()
        ids, best, wrong = packed.ids.long(), best.cpu(), wrong.cpu()
        for begin, end in itertools.pairwise(starts):
            first_mistake = wrong[begin:end].nonzero()[:1, 0].tolist()
            result.right += begin < end and not first_mistake
            for position in first_mistake:
                mark, text = _mistake(renderer, ids[begin:end].tolist(), position, best[begin:])
                result.marks[mark] += 1
                result.mistakes.append(text)
    return result


def _packs(renderer: Renderer, encoded: list[tuple[Any, Any]]) -> Iterator[Packed]:
    for ids, trained in encoded:
        trained[: renderer.last_reply(ids)] = 0
    for first in range(0, len(encoded), _TOGETHER):
        part = encoded[first : first + _TOGETHER]
        stream = itertools.chain(part, itertools.repeat(part[-1]))
        yield pack(stream, sum(len(ids) for ids, _ in part))


def _mistake(renderer: Renderer, ids: list[int], position: int, best: Tensor) -> tuple[str, str]:
    """The special token before the wrong token at `position`, and a text with the question, the
    reply, the token that the model chose and the right one."""
    names = {renderer.token_id(mark): mark for mark in _MARKS}
    mark = next((names[t] for t in ids[position - 1 :: -1] if t in names), "")
    if ids[position - 1] in names:
        mark += " at once"
    reply = renderer.last_reply(torch.tensor(ids).numpy())
    question = renderer.decode(ids[max(0, reply - 160) : reply])
    right, chosen = renderer.decode([ids[position]]), renderer.decode([int(best[position - 1])])
    before = renderer.decode(ids[reply:position])
    rest = renderer.decode(ids[position : position + 40])
    return mark, f"...{question!r}\n    {before!r} then {chosen!r} in place of {right!r}: {rest!r}"


def report(
    weights: Weights,
    bias: Tensor,
    renderer: Renderer,
    config: Any,
    count: int,
    side: str = "held out",
    examples: int = 0,
) -> Iterator[str]:
    """Lines with the share of right replies by kind, and with `examples` the mistakes by special
    token and some of them in full."""
    counts = {**dict.fromkeys((*KINDS, *TYPED_KINDS), count), EARLY_FACT: max(1, count // 8)}
    results = {
        kind: judge(weights, bias, renderer, held_out_dialogues(kind, side, number), config)
        for kind, number in counts.items()
    }
    yield f"{side}: " + ", ".join(
        f"{k} {r.right / max(1, r.count):.3f}" for k, r in results.items()
    )
    for kind, result in results.items() if examples else ():
        marks = ", ".join(f"{mark} {n}" for mark, n in result.marks.most_common())
        yield f"  {kind}, {result.count} replies, mistakes after: {marks}"
        yield from (f"    {text}" for text in result.mistakes[:examples])
