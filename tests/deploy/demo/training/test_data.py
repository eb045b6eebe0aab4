import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from glimmer.deploy.demo.checkpoint import make_tokenizer
from glimmer.deploy.demo.training.data import CONTEXT, Renderer, batches, pack, unpack
from glimmer.deploy.demo.training.dialogues import dialogue
from glimmer.deploy.demo.training.model import LONGEST


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(make_tokenizer())


def trained_text(renderer: Renderer, text: str) -> str:
    ids, trained = renderer.encode([text])[0]
    chosen = ids[trained.astype(bool)].astype(int).tolist()
    return str(make_tokenizer().decode(chosen, skip_special_tokens=False))


def test_the_assistants_words_and_its_end_are_trained(renderer: Renderer) -> None:
    text = (
        "[gMASK]<sop><|user|>q<|assistant|></think>a<|user|>r<|assistant|><think>t</think>b<|user|>"
    )
    assert trained_text(renderer, text) == "a<|user|>t</think>b<|user|>"
    call = (
        "[gMASK]<sop><|user|>q<|assistant|><think>t</think><tool_call>f</tool_call><|observation|>"
    )
    assert trained_text(renderer, call) == "t</think><tool_call>f</tool_call><|observation|>"
    assert trained_text(renderer, "q\na<|endoftext|>").endswith("a<|endoftext|>")


def test_thinking_off_leaves_no_thought(renderer: Renderer) -> None:
    item = next(d for d in map(dialogue, itertools.count()) if not d.thinking)
    assert "<think>" not in renderer.text(item)


def test_packing_fills_the_batch_and_marks_sequences() -> None:
    sequences = [(np.full(n, n, np.int16), np.ones(n, np.uint8)) for n in (5, 3, 9)]
    batch = unpack(pack(iter(sequences), 12), 0.5, "cpu")
    assert batch.ids.tolist() == [5] * 5 + [3] * 3 + [9] * 4
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]
    assert batch.starts.tolist()[:5] == [0, 5, 8, 12, 12]
    assert batch.weights.tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 1, 1]


def test_some_sequences_jump_to_later_positions_once() -> None:
    sequence = (np.arange(100, dtype=np.int16), np.ones(100, np.uint8))
    packed = pack(itertools.repeat(sequence), 10_000, jumps=random.Random(0))
    steps = packed.positions.reshape(100, 100).diff()
    jumping = (steps > 1).sum(1)
    assert set(jumping.tolist()) == {0, 1}
    assert 10 < (jumping == 1).sum() < 45
    assert ((steps == 1).sum(1) >= 98).all()
    assert CONTEXT // 2 < packed.positions.max() < CONTEXT


def test_long_batches_begin_with_a_long_dialogue() -> None:
    text = make_tokenizer().to_str()
    packed = next(batches(text, 40_000, "long", 0, long_share=1.0))
    assert packed.starts[1] > 5000
    assert packed.longest == 40_000
    assert next(batches(text, 4096, "short", 0)).longest == LONGEST
    with pytest.raises(ValueError, match="batches of 32768 tokens, not 4096"):
        batches(text, 4096, "short", 0, long_share=0.5)


def test_prompts_weigh_what_they_are_told() -> None:
    sequence = (np.arange(6, dtype=np.int16), np.array([0, 0, 0, 1, 1, 0], np.uint8))
    weights = unpack(pack(iter([sequence]), 6), 0.25, "cpu").weights
    assert weights.tolist() == [0, 0, 0.25, 1, 1, 0.25]


def test_batches_differ_by_seed_and_not_by_run(tmp_path: Path) -> None:
    text = make_tokenizer().to_str()
    first, again, other = (next(batches(text, 4096, seed, 0)).ids for seed in "112")
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
