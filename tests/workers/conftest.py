"""Shared by worker tests: tiny transformers models, and a driver that plays the scheduler."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.shared.config import ServeConfig
from glimmer.shared.lifecycle import CONFIG_FILE
from glimmer.shared.messages import (
    AnyMessage,
    Message,
    PagesAppended,
    PrefillChunk,
    RowAdmit,
    StepPlan,
    StepResult,
    TokenLogprob,
)
from glimmer.shared.sampling import SamplingParams
from glimmer.shared.transport import (
    Receiver,
    Sender,
    launcher_address,
    scheduler_address,
    worker_address,
)
from glimmer.workers.startup import load_runner
from glimmer.workers.step import ModelRunner

torch.set_num_threads(1)

VOCAB = 160
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "max_position_embeddings": 4096,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {  # expert groups, two shared experts, two dense layers, rope in halves
        "num_attention_heads": 2,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 2,
        "first_k_dense_replace": 2,
        "mlp_layer_types": ["dense", "dense", "sparse"],
        "rope_interleave": False,
    },
    "all_sparse": {  # no dense layer, more heads, weights not normalised, odd widths
        "num_attention_heads": 8,
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "first_k_dense_replace": 0,
        "mlp_layer_types": ["sparse"] * 3,
        "kv_lora_rank": 20,
        "q_lora_rank": 36,
        "qk_nope_head_dim": 12,
        "v_head_dim": 10,
    },
}
PAGE_SIZES = {"plain": 16, "grouped": 64, "all_sparse": 5}


@dataclass
class Reference:
    """A transformers model and the directory it was saved to."""

    path: Path
    model: Any
    page_size: int

    def widened(self) -> "Reference":
        """The same weights computed in float32."""
        return Reference(self.path, _reload(self.path, torch.float32), self.page_size)

    def logprobs(self, token_ids: list[int]) -> torch.Tensor:
        """log_softmax of the logits after each token, [len, vocab] float32."""
        ids = torch.tensor([token_ids], device=self.model.device)
        with torch.no_grad():
            logits: torch.Tensor = self.model(ids, use_cache=False).logits[0]
        return logits.float().log_softmax(-1).cpu()


@pytest.fixture(scope="session")
def make_reference(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, torch.dtype], Reference]:
    """(variant, dtype) -> a random model, saved by transformers itself."""
    made: dict[tuple[str, torch.dtype], Reference] = {}

    def make(variant: str = "plain", dtype: torch.dtype = torch.float32) -> Reference:
        if (variant, dtype) not in made:
            path = tmp_path_factory.mktemp("reference")
            made[variant, dtype] = _save_random_model(path, variant, dtype)
        return made[variant, dtype]

    return make


def _save_random_model(path: Path, variant: str, dtype: torch.dtype) -> Reference:
    from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    values = {**BASE, **VARIANTS[variant]}
    values["num_key_value_heads"] = values["num_attention_heads"]
    model = Glm4MoeLiteForCausalLM(Glm4MoeLiteConfig(**values)).eval()  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(sorted(VARIANTS).index(variant))
    state = model.state_dict()
    for name in sorted(state):
        value = state[name]
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            value.copy_(noise * 0.1)
        elif value.dim() == 1:
            value.copy_(1 + noise * 0.1)
        else:
            value.copy_(noise * (1 if "embed" in name else value.shape[-1] ** -0.5))
    model.save_pretrained(path)
    if dtype != torch.float32:
        _reload(path, dtype).save_pretrained(path)
    return Reference(path, _reload(path, dtype), PAGE_SIZES[variant])


def _reload(path: Path, dtype: torch.dtype) -> Any:
    """As users load it. Not `model.to(dtype)`: that would round the rope frequencies and the
    routing biases too, which are float32 in every real model."""
    from transformers import Glm4MoeLiteForCausalLM

    model = Glm4MoeLiteForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    model.set_experts_implementation("eager")
    return model.eval()  # type: ignore[no-untyped-call]


def make_config(path: Path, **changes: Any) -> ServeConfig:
    """A settled config for a tiny model on the CPU."""
    values: dict[str, Any] = {
        "model_dir": str(path),
        "device": "cpu",
        "max_req_total_len": 2048,
        "max_total_token_num": 16384,
        "running_max_req_size": 24,
        "step_timeout_s": 60.0,
    }
    return ServeConfig(**{**values, **changes})


@pytest.fixture(autouse=True, scope="module")
def _give_back_gpu_memory() -> Iterator[None]:
    """Free the memory of a module's runners for the next module and the processes it starts."""
    yield
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def config_of() -> Callable[..., ServeConfig]:
    """`make_config` for test modules."""
    return make_config


@pytest.fixture
def make_runner(tmp_path: Path) -> Callable[..., ModelRunner]:
    """(model directory, **config changes) -> a runner in this process."""

    def make(path: Path, **changes: Any) -> ModelRunner:
        runner = load_runner(make_config(path, **changes), 0, 0, tmp_path, lambda *_: None)
        torch.set_num_threads(1)
        return runner

    return make


@dataclass
class Sequence:
    """One running request as the driver sees it."""

    prompt: list[int]
    sampling: SamplingParams
    row: int
    pages: list[int]
    num_cached: int = 0
    num_done: int = 0  # tokens whose KV is planned or written
    outputs: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    admitted: bool = False

    @property
    def finished(self) -> bool:
        return len(self.outputs) >= self.sampling.max_new_tokens


class Driver:
    """Plays the scheduler: chunks prompts, appends pages one by one, mixes prefill and decode.

    `run` takes a plan and gives its result. Pages of finished sequences are kept for reuse as
    cached prefixes until `clear`.
    """

    def __init__(self, run: Callable[[StepPlan], StepResult], page_size: int) -> None:
        self.run = run
        self.page_size = page_size
        self.clear()
        self.step_number = 0

    def clear(self) -> None:
        self.next_page = self.next_row = 0
        self.running: list[Sequence] = []

    def add(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        cached: Sequence | None = None,
        outputs: list[int] | None = None,
    ) -> Sequence:
        """Queue a request. `cached`: start from the full pages this older sequence shares with
        the prompt. `outputs`: resume after these tokens."""
        sequence = Sequence(prompt, sampling, self.next_row, [], outputs=list(outputs or []))
        self.next_row += 1
        if cached is not None:
            old = (cached.prompt + cached.outputs)[: cached.num_done]
            pairs = zip(old, (prompt + sequence.outputs)[:-1], strict=False)
            shared = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            if shared is None:
                shared = min(len(old), len(prompt) + len(sequence.outputs) - 1)
            num_pages = shared // self.page_size
            sequence.pages = cached.pages[:num_pages]
            sequence.num_cached = sequence.num_done = num_pages * self.page_size
        self.running.append(sequence)
        return sequence

    def step(self, chunk_size: int | None = None) -> StepResult:
        """One plan over everything that runs."""
        admitted, appended, prefill, decode = [], [], [], []
        sampling: list[Sequence] = []
        decoding: list[Sequence] = []
        for s in self.running:
            known = s.prompt + s.outputs
            if not s.admitted:
                admitted.append(self._admit(s, known))
            decoding_now = s.num_done == len(known) - 1 and bool(s.outputs) and s.admitted
            size = 1 if decoding_now else min(chunk_size or 1 << 30, len(known) - s.num_done)
            end = s.num_done + size
            new_pages = self._take_pages(s, end)
            if new_pages:
                appended.append(PagesAppended(s.row, new_pages))
            if decoding_now:
                decode.append(s.row)
                decoding.append(s)
            else:
                last = end == len(known)
                ids = known[s.num_done : end]
                following = -1 if last else known[end]
                prefill.append(PrefillChunk(s.row, s.num_done, ids, last, following))
                if last:
                    sampling.append(s)
            s.num_done = end
            s.admitted = True
        self.step_number += 1
        plan = StepPlan(0, self.step_number, [], admitted, appended, prefill, decode)
        result = self.run(plan)
        assert (result.epoch, result.step) == (0, self.step_number)
        for s, found in zip(sampling + decoding, result.rows, strict=True):
            s.outputs += found.token_ids
            s.logprobs += found.logprobs
        by_row = {s.row: s for s in self.running}
        for chunk, entries in zip(prefill, result.prompt_logprobs, strict=bool(prefill)):
            by_row[chunk.row].prompt_logprobs += entries
        self.running = [s for s in self.running if not s.finished]
        return result

    def _admit(self, s: Sequence, known: list[int]) -> RowAdmit:
        counted = known if s.sampling.input_penalty else s.outputs
        counted = list(counted) if s.sampling.uses_penalties else []
        pages = list(s.pages)
        return RowAdmit(s.row, s.sampling, pages, s.num_cached, len(s.outputs), counted)

    def _take_pages(self, s: Sequence, num_tokens: int) -> list[int]:
        missing = -(-num_tokens // self.page_size) - len(s.pages)
        pages = list(range(self.next_page, self.next_page + missing))
        self.next_page += len(pages)
        s.pages += pages
        return pages

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingParams,
        chunk_size: int | None = None,
    ) -> list[Sequence]:
        """All prompts together until each has its tokens. Rows and pages start from none."""
        self.clear()
        sequences = [self.add(prompt, sampling) for prompt in prompts]
        self.finish(chunk_size)
        return sequences

    def finish(self, chunk_size: int | None = None) -> None:
        """Step until nothing runs."""
        while self.running:
            self.step(chunk_size)


@pytest.fixture(scope="session")
def driver_of() -> Callable[[Callable[[StepPlan], StepResult], int], Driver]:
    """The Driver class, for test modules."""
    return Driver


class Group:
    """Real worker processes, with this test as their launcher and scheduler."""

    def __init__(self, config: ServeConfig, runtime_dir: Path) -> None:
        self.config = config
        self.runtime_dir = str(runtime_dir)
        config.save(runtime_dir / CONFIG_FILE)
        self.launcher = Receiver.bind(launcher_address(self.runtime_dir))
        self.scheduler = Receiver.bind(scheduler_address(self.runtime_dir))
        self.heard_by_launcher: list[AnyMessage] = []
        self.heard_by_scheduler: list[AnyMessage] = []
        command = [sys.executable, "-m", "glimmer.workers", "--runtime_dir", self.runtime_dir]
        command += ["--parent_pid", str(os.getpid())]  # none is left if the tests are killed
        self.processes = [
            subprocess.Popen([*command, "--index", str(rank)]) for rank in range(config.tp)
        ]
        self.senders = [
            Sender.connect(worker_address(self.runtime_dir, 0, rank)) for rank in range(config.tp)
        ]

    def send(self, message: Message) -> None:
        """To every rank."""
        for sender in self.senders:
            sender.send(message)

    def wait_for(
        self, kind: type, count: int = 1, at: str = "scheduler", patience_s: float = 60
    ) -> list[Any]:
        """The first `count` messages of this type that the scheduler or launcher hears. Fails
        when nothing comes for so long."""
        inbox = self.scheduler if at == "scheduler" else self.launcher
        heard = self.heard_by_scheduler if at == "scheduler" else self.heard_by_launcher
        while len(found := [m for m in heard if isinstance(m, kind)]) < count:
            new = inbox.receive(patience_s)
            assert new, f"no {kind.__name__} came"
            heard += new
        return found

    def run(self, plan: StepPlan) -> StepResult:
        """Send a plan to all ranks, wait for its result."""
        before = len([m for m in self.heard_by_scheduler if isinstance(m, StepResult)])
        self.send(plan)
        result = self.wait_for(StepResult, before + 1)[-1]
        assert isinstance(result, StepResult)
        return result

    def launch(self, plan: StepPlan) -> StepResult:
        """The same: this and `finish` are the runner's."""
        return self.run(plan)

    def finish(self, result: StepResult) -> StepResult:
        return result

    def exit_codes(self) -> list[int]:
        """Wait for the end of all processes."""
        return [process.wait(60) for process in self.processes]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for sender in self.senders:
            sender.close()
        self.launcher.close()
        self.scheduler.close()


@pytest.fixture
def start_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Group]]:
    """(model directory, **config changes) -> worker processes; ended after the test."""
    groups: list[Group] = []

    def start(path: Path, **changes: Any) -> Group:
        runtime_dir = tmp_path_factory.mktemp("rt")
        groups.append(Group(make_config(path, **changes), runtime_dir))
        return groups[-1]

    yield start
    for group in groups:
        group.close()


@pytest.fixture(scope="session")
def gap_where_parted() -> Callable[[Sequence, Sequence], float | None]:
    """Two runs of a prompt with num_logprobs >= 2 -> where their tokens part, by how much the first
    run liked its token better than the next one; None if they do not part."""

    def gap(one: Sequence, other: Sequence) -> float | None:
        pairs = zip(one.outputs, other.outputs, one.logprobs, strict=True)
        tops = [entry.top for a, b, entry in pairs if a != b]
        return tops[0][0][1] - tops[0][1][1] if tops else None

    return gap
