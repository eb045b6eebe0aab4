import pytest
import torch
from glimmer.deploy.demo.checkpoint import make_tokenizer, tiny_config
from glimmer.deploy.demo.training.data import Renderer
from glimmer.deploy.demo.training.model import init_weights
from glimmer.deploy.demo.training.validation import (
    EARLY_FACT,
    SIDES,
    held_out_dialogues,
    judge,
    report,
)


def test_only_the_first_mistake_of_a_reply_is_told() -> None:
    tokenizer = make_tokenizer()
    config = tiny_config(vocab_size=tokenizer.get_vocab_size(), num_hidden_layers=2, v_head_dim=48)
    weights, bias = init_weights(config, 0), torch.zeros(2, 8)
    dialogues = held_out_dialogues("call", "held out", 3)
    result = judge(weights, bias, Renderer(tokenizer), dialogues, config)
    assert (result.right, result.count, sum(result.marks.values())) == (0, 3, 3)
    # The model has learnt nothing, so the first token after the tag is wrong.
    assert set(result.marks) <= {"<think> at once", "</think> at once"}
    lines = list(report(weights, bias, Renderer(tokenizer), config, 1, examples=1))
    assert lines[0].startswith("held out: chat 0.000, call 0.000")
    assert any("in place of" in line for line in lines)


@pytest.mark.parametrize("side", SIDES)
def test_every_side_has_dialogues_of_its_own(side: str) -> None:
    texts = {
        other: [str(d.messages) for d in held_out_dialogues("call", other, 3)] for other in SIDES
    }
    assert all(texts[side] != texts[other] for other in SIDES if other != side)
    facts = held_out_dialogues(EARLY_FACT, side, 1)
    assert len(facts[0].messages[-2]["content"].split()) > 1000 or len(facts[0].messages) == 3
