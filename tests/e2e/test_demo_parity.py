"""The demo model's replies are those of transformers, which reads its directory as it is.

`pytest tests/e2e/test_demo_parity.py --parity-prompts 50` compares as many dialogues.
"""

from pathlib import Path

import pytest
import torch
from engine import Engine
from glimmer.deploy.demo.run import MODEL_DIR
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.sampling import SamplingParams
from models import held_out_prompts
from transformers import AutoModelForCausalLM
from transformers.utils import logging

OUTPUT = 48
LONGEST = 700  # tokens of a prompt


def test_greedy_replies_are_those_of_transformers(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    prompts = held_out_prompts(pytestconfig.getoption("--parity-prompts"), LONGEST)
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
