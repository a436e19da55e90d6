"""Manifests: buckets, their hash, and the words for a difference."""

import pytest
import torch

from rto_megatron.weight_sync.manifest import (
    Manifest,
    PieceSpec,
    bucket_buffer,
    digests,
    first_difference,
    slot_view,
)


def spec(name: str, length: int, sender: int = 0, dtype: str = "float32") -> PieceSpec:
    return PieceSpec(name, dtype, (length,), sender, 0, 0, length)


def test_buckets_keep_the_order_and_stay_under_the_limit() -> None:
    specs = tuple(spec(f"t{index}", 10) for index in range(7))  # 40 bytes each, 48 with padding
    buckets = Manifest(100, specs).buckets()
    assert [[slot.spec.name for slot in bucket.slots] for bucket in buckets] == [
        ["t0", "t1"],
        ["t2", "t3"],
        ["t4", "t5"],
        ["t6"],
    ]
    assert [slot.offset for slot in buckets[0].slots] == [0, 48]
    assert buckets[0].num_bytes == 96


def test_a_tensor_over_the_limit_travels_alone() -> None:
    buckets = Manifest(64, (spec("small", 4), spec("large", 100), spec("last", 4))).buckets()
    assert [[slot.spec.name for slot in bucket.slots] for bucket in buckets] == [
        ["small"],
        ["large"],
        ["last"],
    ]


def test_a_bucket_never_mixes_senders_and_senders_take_turns() -> None:
    specs = (spec("a", 1, 0), spec("b", 1, 1), spec("c", 4, 0), spec("d", 4, 1))
    buckets = Manifest(16, specs).buckets()
    assert [(bucket.sender, bucket.slots[0].spec.name) for bucket in buckets] == [
        (0, "a"),
        (1, "b"),
        (0, "c"),
        (1, "d"),
    ]


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([(0, 2), (2, 2)], None),
        ([(0, 2), (3, 1)], r"3 to 4 of dimension 0 from sender 1 does not begin at 2"),
        ([(0, 2), (1, 3)], r"does not begin at 2"),
        ([(0, 2), (2, 1)], r"the pieces of a \[4, 3\] end at 3 of dimension 0"),
    ],
)
def test_pieces_must_tile_their_tensor(runs: list[tuple[int, int]], words: str | None) -> None:
    specs = tuple(PieceSpec("a", "float32", (4, 3), sender, 0, *run) for sender, run in enumerate(runs))
    if words is None:
        assert Manifest(100, specs).num_bytes == 48
        assert len(Manifest(100, specs).buckets()) == 2
    else:
        with pytest.raises(ValueError, match=words):
            Manifest(100, specs).buckets()


def test_views_of_a_bucket_do_not_overlap_and_keep_their_dtype() -> None:
    specs = (
        spec("half", 3, dtype="bfloat16"),
        spec("single", 5),
        PieceSpec("grid", "float32", (2, 3), 0, 0, 0, 2),
    )
    (bucket,) = Manifest(1000, specs).buckets()
    buffer = bucket_buffer(bucket, torch.device("cpu"))
    values = [torch.arange(3).bfloat16(), torch.arange(5.0) + 10, torch.arange(6.0).view(2, 3) + 100]
    digests(bucket, buffer).fill_(-7)
    for slot, value in zip(bucket.slots, values, strict=True):
        slot_view(buffer, slot).copy_(value)
    for slot, value in zip(bucket.slots, values, strict=True):
        assert torch.equal(slot_view(buffer, slot), value)
    assert digests(bucket, buffer).tolist() == [-7] * 3
    assert buffer.numel() == bucket.num_bytes + 3 * 8


@pytest.mark.parametrize(
    "other",
    [
        Manifest(101, (spec("a", 4), spec("b", 8))),
        Manifest(100, (spec("b", 8), spec("a", 4))),
        Manifest(100, (spec("a", 4), spec("b", 9))),
        Manifest(100, (spec("a", 4), spec("b", 8, sender=1))),
        Manifest(100, (spec("a", 4), spec("b", 8, dtype="bfloat16"))),
        Manifest(100, (spec("a", 4),)),
    ],
)
def test_any_difference_changes_the_hash_and_has_words(other: Manifest) -> None:
    ours = Manifest(100, (spec("a", 4), spec("b", 8)))
    assert ours.sha256() != other.sha256()
    assert first_difference(ours, other) != ""
    assert first_difference(ours, Manifest.from_json(ours.to_json())) == ""


def test_the_difference_names_the_tensor() -> None:
    ours, theirs = Manifest(100, (spec("a", 4), spec("b", 8))), Manifest(100, (spec("a", 4),))
    assert first_difference(ours, theirs) == "entry 1: b float32 [8] from sender 0 against the end"


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a float32 \[4\] from sender 0 does not begin at 4"):
        Manifest(100, (spec("a", 4), spec("a", 4))).buckets()


def test_another_protocol_is_refused() -> None:
    with pytest.raises(ValueError, match="protocol 99"):
        Manifest.from_json("[99,100,[]]")
