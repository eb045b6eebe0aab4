"""Prompts of the demo model that it was not trained on."""

import itertools

from glimmer.deploy.demo.run import MODEL_DIR
from glimmer.deploy.demo.training.dialogues import KINDS, dialogue
from transformers import AutoTokenizer


def held_out_prompts(count: int, longest: int = 1500) -> list[list[int]]:
    """Dialogues of every kind up to their last reply, with thinking and without, of at most
    `longest` tokens: others take long on a CPU."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
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
        if len(ids) <= longest:
            prompts.append(ids)
    return prompts
