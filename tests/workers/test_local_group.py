"""Exchanges over shared memory: the same bits on all ranks, and no rank waits for a dead one."""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.workers.local_group import LocalGroup, join_local
from glimmer.workers.parallel import Ranks

MANY = (4 << 20) // 4 + 77  # float32 numbers, more than a slot holds
_RANK_ONE = """
import sys, torch, pathlib
from glimmer.workers.local_group import join_local
group = join_local(1, 3, pathlib.Path(sys.argv[1]), 30)
group.all_reduce(torch.ones(3))
print("met", flush=True)
sys.stdin.read()
"""


def in_ranks(size: int, path: Path, act: Callable[[LocalGroup, int], Any]) -> list[Any]:
    """`act` with each rank's group, in a thread each."""

    def one(rank: int) -> Any:
        with contextlib.closing(join_local(rank, size, path, 20)) as group:
            return act(group, rank)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ranks_get_the_same_sum_in_the_order_of_ranks(
    tmp_path: Path, size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(size)
    shapes = [(1,), (7, 33), (0, 4), (2, MANY)]
    given = [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(size)]
    expected = [parts[0].clone() for parts in zip(*given, strict=True)]
    for tensors in given[1:]:
        for total, part in zip(expected, tensors, strict=True):
            total.add_(part)

    def act(group: LocalGroup, rank: int) -> None:
        for _ in range(3):  # every slot is used again
            for x in given[rank]:
                group.all_reduce(x.clone())
        for x in given[rank]:
            group.all_reduce(x)

    in_ranks(size, tmp_path / "r", act)
    for tensors in given:
        for x, y in zip(tensors, expected, strict=True):
            assert torch.equal(x, y)
    assert not list(tmp_path.iterdir()), "the meeting place is gone"


def test_columns_of_a_matrix_and_other_types(tmp_path: Path) -> None:
    def act(group: LocalGroup, rank: int) -> Any:
        ranks = Ranks(rank, 3, group)
        wide = torch.arange(12.0).view(3, 4) + 100 * rank
        assert ranks.all_reduce(wide[:, 1]) is not None, "not contiguous"
        ids = ranks.broadcast(torch.tensor([1 << 40, 7]) * (rank == 0))
        # The rows are many enough for several pieces, whose ends are within rows.
        columns = torch.full((MANY, 3), float(rank))
        return wide, ids.tolist(), ranks.gather_columns(columns)

    found = in_ranks(3, tmp_path / "r", act)
    for rank, (wide, ids, gathered) in enumerate(found):
        assert wide[:, 1].tolist() == [303.0, 315.0, 327.0]
        assert wide[0, 0] == 100 * rank
        assert ids == [1 << 40, 7]
        assert (gathered is None) == (rank > 0)
    assert torch.equal(
        found[0][2], torch.tensor([0.0, 1.0, 2.0]).repeat_interleave(3).expand(MANY, 9)
    )


def test_a_killed_rank_is_an_error_at_once(tmp_path: Path) -> None:
    path = tmp_path / "r"
    both_ended = threading.Barrier(2)
    command = [sys.executable, "-c", _RANK_ONE, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as victim, ThreadPoolExecutor(2) as pool:

        def act(rank: int) -> float:
            with contextlib.closing(join_local(rank, 3, path, 300)) as group:
                group.all_reduce(torch.ones(3))
                with pytest.raises(RuntimeError, match="rank 1 is gone"):
                    group.all_reduce(torch.ones(3))
                ended = time.monotonic()
                both_ended.wait()
            return ended

        ends = [pool.submit(act, rank) for rank in (0, 2)]
        assert victim.stdout is not None
        assert victim.stdout.readline() == b"met\n"
        time.sleep(0.5)  # the others wait for it now
        killed = time.monotonic()
        victim.kill()
        assert max(end.result(60) for end in ends) - killed < 20, "the limit is 300 s"


def test_a_rank_that_does_not_come_is_an_error_after_the_timeout(tmp_path: Path) -> None:
    for rank in (0, 1):
        with pytest.raises(RuntimeError, match=f"rank {rank} did not meet the others"):
            join_local(rank, 2, tmp_path / "r", 0.1)

    both_ended = threading.Barrier(2)

    def act(rank: int) -> None:
        with contextlib.closing(join_local(rank, 2, tmp_path / "r", 1.0)) as group:
            if rank == 0:
                with pytest.raises(RuntimeError, match=r"no answer of ranks \[1\]"):
                    group.all_reduce(torch.ones(3))
            both_ended.wait()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(act, range(2)))
