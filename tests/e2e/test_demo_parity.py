"""The demo model's replies are those of transformers, which reads its directory as it is.

`pytest tests/e2e/test_demo_parity.py --parity-prompts 50` compares as many dialogues.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Engine
from glimmer.deploy.demo.dialogues import KINDS, dialogue
from glimmer.deploy.demo.run import MODEL_DIR
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.sampling import SamplingParams
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

OUTPUT = 64
LONGEST = 1500


def held_out_prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Dialogues of every kind up to their last reply, with thinking and without; not the longest,
    which take long on a CPU."""
    prompts: list[list[int]] = []
    for number in itertools.count():
        if len(prompts) == count:
            break
        one = dialogue(f"parity-{number}", True, list(KINDS)[number % len(KINDS)])
        last = max(i for i, m in enumerate(one.messages) if m["role"] == "assistant")
        text = tokenizer.apply_chat_template(
            one.messages[:last],
            tools=one.tools or None,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=number % 2 == 0,
        )
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) <= LONGEST:
            prompts.append(ids)
    return prompts


def test_greedy_replies_are_those_of_transformers(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    prompts = held_out_prompts(tokenizer, pytestconfig.getoption("--parity-prompts"))
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        reply = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=OUTPUT
        )
        expected.append(reply[0, len(prompt) :].tolist())
    ends = load_model_spec(MODEL_DIR).eos_token_ids
    assert any(reply[-1] in ends for reply in expected), "the model ends its turns"
    engine = Engine(MODEL_DIR, tmp_path, eos_id=ends)
    sampling = SamplingParams(max_new_tokens=OUTPUT, stop_token_ids=ends)
    assert engine.generate(prompts, sampling) == expected
