"""Saves a training run, so that several calls of `train.py` make one run.

`state.safetensors` has everything in float32: a run that stops and goes on equals one that does not
stop, but for its data. `weights.safetensors` has the weights only, in bf16: small enough to be
fetched from a machine that may be taken away. A run that goes on from it has a new optimizer state.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FULL, SMALL = "state.safetensors", "weights.safetensors"


@dataclass(frozen=True)
class Progress:
    """Steps that are done, and the seconds that they took."""

    steps: int = 0
    seconds: float = 0.0


def save(
    directory: Path,
    progress: Progress,
    weights: dict[str, Tensor],
    bias: Tensor,
    optimizers: list[torch.optim.Optimizer],
) -> None:
    """Write both files. A run that is killed meanwhile leaves the earlier files as they were."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"weight.{name}": tensor.detach() for name, tensor in weights.items()}
    small = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    for number, optimizer in enumerate(optimizers):
        for index, entries in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{k}": v for k, v in entries.items()}
    meta = {"progress": json.dumps(asdict(progress))}
    for file, values in ((FULL, tensors), (SMALL, small)):
        on_cpu = {name: t.cpu().contiguous() for name, t in (values | {"bias": bias}).items()}
        save_file(on_cpu, str(directory / f"{file}.new"), metadata=meta)
        (directory / f"{file}.new").replace(directory / file)


def load(
    directory: Path,
    weights: dict[str, Tensor],
    bias: Tensor,
    optimizers: list[torch.optim.Optimizer],
) -> Progress:
    """Go on from the directory's files, the full one if it is there. Changes the tensors in place.
    Without files nothing changes. Raises ValueError if they are of a model of another shape."""
    files = [directory / file for file in (FULL, SMALL) if (directory / file).exists()]
    if not files:
        return Progress()
    with safe_open(str(files[0]), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        progress = Progress(**json.loads(file.metadata()["progress"]))
    with torch.no_grad():
        for name, tensor in (*weights.items(), ("bias", bias)):
            saved = tensors["bias" if name == "bias" else f"weight.{name}"]
            if saved.shape != tensor.shape:
                raise ValueError(
                    f"{files[0]}: {name} is {list(saved.shape)}, not {list(tensor.shape)}"
                )
            tensor.copy_(saved)
    for number, optimizer in enumerate(optimizers):
        entries: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer" and rest.startswith(f"{number}."):
                _, index, key = rest.split(".")
                entries.setdefault(int(index), {})[key] = tensor
        if entries:
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": entries, "param_groups": groups})
    return progress
