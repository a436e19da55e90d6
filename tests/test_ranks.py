"""The helper that forks ranks reports what they return and how they fail, and leaves none behind."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks


def test_ranks_talk_and_return_tensors_in_order():
    def gather(offset: int) -> torch.Tensor:
        dist.init_process_group("gloo")
        mine = torch.tensor([dist.get_rank() + offset], dtype=torch.bfloat16)
        total = mine.float()
        dist.all_reduce(total)
        return torch.cat([mine.float(), total])

    results = run_ranks(3, gather, 10)
    assert [result.tolist() for result in results] == [[10.0, 33.0], [11.0, 33.0], [12.0, 33.0]]


def test_backward_works_in_ranks_after_a_backward_in_the_test():
    def gradient() -> float:
        weight = torch.ones(2, requires_grad=True)
        (weight * 3).sum().backward()
        return float(weight.grad.sum())

    gradient()
    assert run_ranks(2, gradient) == [6.0, 6.0]


def test_the_first_failure_ends_all_ranks_with_its_traceback(tmp_path):
    def fail_on_one() -> None:
        (tmp_path / os.environ["RANK"]).write_text(str(os.getpid()))
        if os.environ["RANK"] == "1":
            raise KeyError("lost")
        time.sleep(3600)

    with pytest.raises(RankError, match=r"rank 1 of 2(?s:.*)KeyError: 'lost'"):
        run_ranks(2, fail_on_one)
    for file in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_a_rank_that_dies_is_reported():
    with pytest.raises(RankError, match="rank 0 died"):
        run_ranks(1, lambda: os._exit(3))


def test_the_time_limit_shows_where_each_rank_hangs():
    def hang() -> None:
        time.sleep(60)

    with pytest.raises(RankError, match=r"rank 0(?s:.*)in hang(?s:.*)rank 1(?s:.*)in hang"):
        run_ranks(2, hang, timeout_seconds=0.5)
