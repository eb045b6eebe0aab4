"""Code that all Triton launches share. Import it only where Triton is in use."""

from functools import cache

import torch
import triton


@cache
def pdl() -> dict[str, bool]:
    """Launch arguments for programmatic dependent launch (Hopper and later).

    A kernel starts while its predecessor ends. Before its `gdc_wait` it must read only data that
    the predecessor does not write, such as weights. All programs of a kernel launched so must reach
    `gdc_wait`; otherwise a later kernel could overtake an earlier one.
    """
    if triton.knobs.runtime.interpret or torch.cuda.get_device_capability()[0] < 9:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


_counters: dict[torch.device, torch.Tensor] = {}


def counters(device: torch.device, count: int) -> torch.Tensor:
    """int32 zeros [at least count], in which kernels count arrivals; kernels leave zeros behind.

    There is one tensor per device, so kernels that use it must run in one stream, and the first
    call must come before any capture of a CUDA graph.
    """
    zeros = _counters.get(device)
    if zeros is None or len(zeros) < count:
        zeros = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
        _counters[device] = zeros
    return zeros
