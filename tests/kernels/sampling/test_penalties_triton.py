"""The Triton penalties against the reference: slots, drafts, repeated pairs, the cap."""

import pytest
import torch
from glimmer.kernels.sampling import penalties
from glimmer.kernels.sampling.penalties_triton import launch_count, launch_penalise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("num_rows", "width", "num_drafts"),
    [
        (3, 37, 0),
        (3, 64, 2),
        *(
            pytest.param(rows, 154_856, drafts, marks=pytest.mark.gpu)
            for rows in (1, 7, 256)
            for drafts in (0, 3)
        ),
    ],
)
def test_penalties(num_rows: int, width: int, num_drafts: int) -> None:
    raw = torch.randn(num_rows, width + 3) * 3
    rows = torch.randint(num_rows + 2, (num_rows,))
    slots = torch.randint(-1, num_rows, (num_rows + 2,), dtype=torch.int32)
    counts = torch.randint(-3, 4, (num_rows, width + width % 2)).clamp(min=0).short()
    columns = [torch.rand(num_rows + 2) + 0.5 for _ in range(3)]
    drafts = torch.randint(-1, width, (num_rows, num_drafts)) if num_drafts else None
    args = [rows, slots, counts, *columns, drafts]
    got = raw.clone().to(DEVICE)[:, :width]  # rows inside wider ones
    launch_penalise(got, *(x if x is None else x.to(DEVICE) for x in args))
    expected = penalties.penalise(raw[:, :width], *args)
    torch.testing.assert_close(got.cpu(), expected, atol=1e-6, rtol=1e-6)  # one rounding less


def test_counts() -> None:
    counts = torch.zeros(3, 10, dtype=torch.int16)
    counts[1, 6:8] = torch.tensor([penalties.MOST - 1, penalties.MOST])
    slots = torch.tensor([1, -1, 0, 2], dtype=torch.int32)
    rows = torch.tensor([0, 0, 1, 2, 2, 2, 3, 3])
    ids = torch.tensor([6, 7, 2, 9, 9, 8, -1, 0])
    on_device = counts.to(DEVICE, copy=True)
    launch_count(rows.to(DEVICE), ids.to(DEVICE), slots.to(DEVICE), on_device)
    penalties.count(rows, ids, slots, counts)
    assert on_device.tolist() == counts.tolist()
