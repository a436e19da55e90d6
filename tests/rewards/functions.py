"""Reward functions of the tests, good and bad; they run in a process of their own."""

import asyncio
import os
import sys
import time

import numpy

from rto_megatron.rewards.sample import Sample


def length(sample: Sample) -> float:
    return float(len(sample.response_ids))


def seen(sample: Sample) -> float:
    """1 if the sample is whole."""
    whole = (
        len(sample.tokens) == len(sample.response_ids)
        and sample.prompt
        and sample.columns["context_messages"]
    )
    print("noise on stdout")
    return float(bool(whole) and "RANK" not in os.environ)


def column(sample: Sample) -> object:
    """What the row says that it wants."""
    return sample.columns["value"]


def first_token(sample: Sample) -> list[float]:
    return [1.0, *([0.0] * (len(sample.response_ids) - 1))]


def remainders(sample: Sample) -> list[float]:
    return [float(token % 5) for token in sample.response_ids]


def halves(sample: Sample) -> list[list[float]]:
    """1 for the first half of a response, 2 for the second, on their last tokens."""
    count = len(sample.response_ids)
    middle = count // 2
    return [[0, middle, 1.0], [middle, count, 2]] if middle else [[0, count, 2]]


under_way: list[str] = []


async def later(sample: Sample) -> float:
    """Comes to its end once four are under way."""
    under_way.append(sample.prompt_id)
    while len(under_way) < 4:
        await asyncio.sleep(0.01)
    return numpy.float32(len(sample.response_ids))  # type: ignore[return-value]


def picky(sample: Sample) -> float:
    if sample.prompt_id == "p2":
        raise LookupError("no such word")
    return 1.0


def slow(sample: Sample) -> float:
    if sample.prompt_id != "p0":
        time.sleep(60)
    return 1.0


def quits(sample: Sample) -> float:
    if sample.prompt_id == "p1":
        sys.exit(3)
    os._exit(7)


def poisoned(sample: Sample) -> float:
    return float("nan") if int(sample.prompt_id[1:]) % 2 else 0.0
