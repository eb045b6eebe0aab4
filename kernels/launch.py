"""What every Triton launch of this folder shares. Import it only where Triton is in use."""

from functools import cache

import torch
import triton


@cache
def pdl() -> dict[str, bool]:
    """Arguments for programmatic dependent launch (Hopper and later): a kernel starts while its
    predecessor ends, and reads nothing but weights before its `gdc_wait`. Every kernel launched
    so must reach `gdc_wait` in all its programs, or a later one could overtake an earlier one."""
    if triton.knobs.runtime.interpret or torch.cuda.get_device_capability()[0] < 9:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


_counters: dict[torch.device, torch.Tensor] = {}


def counters(device: torch.device, count: int) -> torch.Tensor:
    """int32 zeros [>= count] that kernels count arrivals in and leave at zero. One set per device:
    kernels that use it must run in one stream, and the first call comes before any capture."""
    found = _counters.get(device)
    if found is None or len(found) < count:
        found = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
        _counters[device] = found
    return found
