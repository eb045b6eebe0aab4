import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from glimmer.deploy.demo.checkpoint import make_tokenizer
from glimmer.deploy.demo.training.data import Renderer, batches, pack, unpack
from glimmer.deploy.demo.training.dialogues import dialogue


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


def test_prompts_weigh_what_they_are_told() -> None:
    sequence = (np.arange(6, dtype=np.int16), np.array([0, 0, 0, 1, 1, 0], np.uint8))
    weights = unpack(pack(iter([sequence]), 6), 0.25, "cpu").weights
    assert weights.tolist() == [0, 0, 0.25, 1, 1, 0.25]


def test_batches_differ_by_seed_and_not_by_run(tmp_path: Path) -> None:
    text = make_tokenizer().to_str()
    first, again, other = (next(batches(text, 4096, seed, 0)).ids for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
