"""Every kernel test draws the same random inputs in every run. Without a card, Triton kernels run
under its interpreter."""

import os

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
