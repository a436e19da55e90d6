"""From the senders' pieces to a worker's shard: faults are planted with weights of the step before."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from rto_megatron.generation.vllm.worker.landing import Landing
from rto_megatron.generation.vllm.worker.receiver import Receiver, Staged
from rto_megatron.generation.vllm.worker.regions import Place, Region, whole
from rto_megatron.models.weight_map import Split, VocabRows, cut
from rto_megatron.weight_sync.manifest import Bucket, Manifest, PieceSpec, digest, slot_view
from rto_megatron.weight_sync.sender import Sender, agree_on_manifest
from rto_megatron.weight_sync.transport import (
    LOOPBACK,
    Broadcast,
    Communicator,
    DisagreementError,
    Rendezvous,
    listen,
)

SHAPES = {"embed": (13, 8), "q": (8, 8), "k": (8, 8), "down": (8, 24)}
LAYOUTS = {"embed": VocabRows(13), "q": Split(0), "k": Split(0), "down": Split(1)}
NEEDS_WHOLE = {name: (whole(shape),) for name, shape in SHAPES.items()}
SHARD = {
    "embed": (Region((7, 0), (6, 8)),),
    "q": (Region((4, 0), (4, 8)),),
    "k": (Region((4, 0), (4, 8)),),
    "down": (Region((0, 12), (8, 12)),),
}


def weights(step: int) -> dict[str, Tensor]:
    """Two steps differ as two optimizer steps do."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator) * (1 + 1e-4 * step) for name, shape in SHAPES.items()
    }


def manifest(num_senders: int) -> Manifest:
    specs = []
    for name, shape in SHAPES.items():
        dim = LAYOUTS[name].dim
        for rank in range(num_senders):
            start, length = cut(shape[dim], rank, num_senders)
            specs.append(PieceSpec(name, "float32", shape, rank, dim, start, length))
    return Manifest(512, tuple(specs))


def pieces(of: dict[str, Tensor], rank: int, num_senders: int) -> Iterator[tuple[str, Tensor]]:
    for name, layout in LAYOUTS.items():
        shard = layout.shard([of[name]], rank, num_senders)
        yield from zip([name], layout.pieces(shard, rank, num_senders), strict=True)


Change = Callable[[Bucket, Tensor], None]


class DamagedEnd(Communicator):
    """A worker's end that changes what arrives, between the wire and the worker's checks."""

    change: Change
    order: Iterator[Bucket]
    buffers: list[Tensor]

    def start_broadcast(self, buffer: Tensor, source: int) -> Broadcast:
        begun = super().start_broadcast(buffer, source)
        self.buffers.append(buffer)
        return begun

    def finish(self, broadcast: Broadcast) -> None:
        super().finish(broadcast)
        self.change(next(self.order), self.buffers.pop(0))


class ForgetfulEnd(Communicator):
    """A sender's end whose buckets are not what the sender should have packed."""

    change: Change
    order: Iterator[Bucket]

    def start_broadcast(self, buffer: Tensor, source: int) -> Broadcast:
        self.change(next(self.order), buffer)
        return super().start_broadcast(buffer, source)


def push(
    num_senders: int,
    needs: dict[str, tuple[Region, ...]],
    change: Change | None = None,
    before_sending: Change | None = None,
) -> Staged:
    """Pushes step 0 and step 1 to one worker; returns what it staged of the last, or raises its error.

    Args:
        change: of what arrives.
        before_sending: of what a lone sender has packed.
    """
    listener = listen(LOOPBACK)
    world_size = num_senders + 1
    meeting = Rendezvous(LOOPBACK, listener.getsockname()[1], num_senders, world_size, "test", 10, "cpu")
    plan = manifest(num_senders)

    def joined(rank: int, kind: type[Communicator] = Communicator) -> Communicator:
        end = kind(meeting, rank, torch.device("cpu"), listener if rank == 0 else None)
        end.join()
        return end

    def send(rank: int) -> None:
        end = joined(rank, Communicator if before_sending is None else ForgetfulEnd)
        if isinstance(end, ForgetfulEnd):
            assert before_sending is not None
            end.change, end.order = before_sending, iter(plan.buckets() * 2)
        sender = Sender(plan, end)
        for version in (0, 1):
            sender.send(version, pieces(weights(version), rank, num_senders))
            sender.confirm()
        end.exchange("done")

    def receive() -> Staged:
        end = joined(num_senders, Communicator if change is None else DamagedEnd)
        if isinstance(end, DamagedEnd):
            assert change is not None
            end.change, end.order, end.buffers = change, iter(plan.buckets() * 2), []
        receiver = Receiver(plan, needs, end)
        for version in (0, 1):
            agree_on_manifest(plan, version, end, None)
            staged = receiver.receive(version)
            end.agree(None, staged.token)
        end.exchange("done")
        return staged

    with ThreadPoolExecutor(world_size) as threads:
        for rank in range(num_senders):
            threads.submit(send, rank)
        worker = threads.submit(receive)
    return worker.result()


@pytest.mark.parametrize("num_senders", [1, 2, 4])
@pytest.mark.parametrize("needs", [NEEDS_WHOLE, SHARD], ids=["whole", "shard"])
def test_any_cut_of_the_trainer_becomes_any_shard_of_the_worker(
    num_senders: int, needs: dict[str, tuple[Region, ...]]
) -> None:
    staged = push(num_senders, needs)
    new = weights(1)
    for name, full in staged.tensors(manifest(1).tensors()):
        for box in needs[name]:
            assert torch.equal(box.of(full), box.of(new[name])), name
    needed = sum(box.of(new[name]).numel() * 4 for name, boxes in needs.items() for box in boxes)
    assert staged.num_bytes == needed


def change_slot(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Bucket, Tensor], None]:
    def planted(bucket: Bucket, buffer: Tensor) -> None:
        for slot in bucket.slots:
            if slot.spec.name == name:
                view = slot_view(buffer, slot)
                view.copy_(change(view.clone()))

    return planted


def of_second_push(change: Change) -> Change:
    seen: list[Bucket] = []

    def planted(bucket: Bucket, buffer: Tensor) -> None:
        if bucket in seen:
            change(bucket, buffer)
        seen.append(bucket)

    return planted


def test_a_flipped_byte_a_stale_and_a_transposed_tensor_are_named() -> None:
    def flip(value: Tensor) -> Tensor:
        value.view(torch.uint8).view(-1)[17] ^= 1
        return value

    for change in (flip, lambda value: weights(0)["q"], lambda value: value.T):
        with pytest.raises(DisagreementError, match=r"arrived with other numbers than were sent: q float32"):
            push(1, NEEDS_WHOLE, of_second_push(change_slot("q", change)))


def test_two_exchanged_tensors_are_both_named() -> None:
    new = weights(1)

    def exchange(bucket: Bucket, buffer: Tensor) -> None:
        change_slot("q", lambda value: new["k"])(bucket, buffer)
        change_slot("k", lambda value: new["q"])(bucket, buffer)

    with pytest.raises(DisagreementError, match=r"q float32.*k float32"):
        push(1, NEEDS_WHOLE, of_second_push(exchange))


def test_a_bucket_that_was_not_packed_again_is_named() -> None:
    """The digests are those of the weights, so a sender that forgets to copy them into the bucket is caught."""
    stale = of_second_push(change_slot("k", lambda value: weights(0)["k"]))
    with pytest.raises(DisagreementError, match=r"than were sent: k float32"):
        push(1, NEEDS_WHOLE, before_sending=stale)


class Loaded(torch.nn.Module):
    """A worker's parameters; `q` and `k` lie in one, as vLLM has them."""

    def __init__(self) -> None:
        super().__init__()
        for name, rows in {"embed": 6, "qk": 8, "down": 8}.items():
            width = SHARD.get(name, SHARD["q"])[0].sizes[1]
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(rows, width), requires_grad=False))

    def part(self, name: str) -> Tensor:
        if name in ("q", "k"):
            return self.qk.data.narrow(0, 4 * (name == "k"), 4)
        return self.get_parameter(name).data


Copy = Callable[[str, Loaded, Tensor], None]


def rightly(name: str, model: Loaded, loaded: Tensor) -> None:
    model.part(name).copy_(loaded)


def land(copy: Copy = rightly, afterwards: Callable[[Loaded], None] | None = None) -> str | None:
    """What `Landing` says when a loader copies the shard of each announced tensor into a model with `copy`."""
    staged = push(1, SHARD)
    model = Loaded()
    places = {}
    for name, (box,) in SHARD.items():
        parameter = "qk" if name in ("q", "k") else name
        places[name] = ((box, Place.of(model.part(name), parameter, model.get_parameter(parameter))),)
    landing = Landing(model, staged.expected, places)
    with landing.watch():
        for name, full in staged.tensors(manifest(1).tensors()):
            copy(name, model, SHARD[name][0].of(landing.announce(name, full)))
        if afterwards is not None:
            afterwards(model)
    return landing.faults()


def test_a_load_is_watched_as_it_happens() -> None:
    old = weights(0)
    assert land() is None

    def skipping(name: str, model: Loaded, loaded: Tensor) -> None:
        if name != "down":
            rightly(name, model, loaded)

    assert land(skipping) == "not loaded: down"

    def other_half(name: str, model: Loaded, loaded: Tensor) -> None:
        rightly(name, model, loaded._base[:4] if name == "q" and loaded._base is not None else loaded)

    assert land(other_half) == "not loaded: q"

    def stale(name: str, model: Loaded, loaded: Tensor) -> None:
        if name == "k":
            loaded.copy_(SHARD["k"][0].of(old["k"]))
        rightly(name, model, loaded)

    assert land(stale) == "loaded with other numbers than were sent: k"

    def exchanging(name: str, model: Loaded, loaded: Tensor) -> None:
        rightly({"q": "k", "k": "q"}.get(name, name), model, loaded)

    assert land(exchanging) == "loaded into the place of another: k, q"


def test_what_happens_to_a_parameter_after_its_load_is_noticed() -> None:
    old = SHARD["down"][0].of(weights(0)["down"])

    def reload(model: Loaded, name: str) -> Tensor:
        """Moves a parameter to its last memory, as vLLM does, and returns that."""
        last = torch.zeros_like(model.get_parameter(name))
        last.copy_(model.get_parameter(name))
        model.register_parameter(name, torch.nn.Parameter(last, requires_grad=False))
        return last

    def move(model: Loaded) -> None:
        for name in ("embed", "qk", "down"):
            reload(model, name)

    assert land(afterwards=move) is None

    def put_back(model: Loaded) -> None:
        # numpy's write is none of torch's
        reload(model, "down").numpy()[:] = old.numpy()

    assert land(afterwards=put_back) == "changed after it was loaded: down"

    def repack(model: Loaded) -> None:
        model.part("down").copy_(model.part("down").flip(0))
        reload(model, "down")

    assert land(afterwards=repack) is None


def land_a_large_one(sent: Callable[[Tensor], Tensor]) -> str | None:
    """What `Landing` says of a parameter that is changed in place as soon as it was loaded, as kernels have it."""
    loaded = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(1))
    model = torch.nn.Module()
    model.register_parameter("large", torch.nn.Parameter(torch.zeros_like(loaded), requires_grad=False))
    parameter, box = model.get_parameter("large"), whole(tuple(loaded.shape))
    places = {"large": ((box, Place.of(parameter, "large", parameter)),)}
    landing = Landing(model, {"large": {box: digest(sent(loaded))}}, places)
    with landing.watch():
        parameter.copy_(landing.announce("large", loaded))
        parameter.neg_()
    return landing.faults()


def test_what_is_read_back_beside_the_load_is_not_changed_before() -> None:
    assert land_a_large_one(lambda loaded: loaded) is None
    wrong = "loaded with other numbers than were sent: large"
    assert land_a_large_one(lambda loaded: loaded.flip(0)) == wrong


def between(
    plan: Manifest, needs: dict[str, tuple[Region, ...]], of_ranks: list[dict[str, Tensor]]
) -> Staged:
    """One push of what each sender has; returns what a worker staged."""
    listener = listen(LOOPBACK)
    world_size = len(of_ranks) + 1
    meeting = Rendezvous(LOOPBACK, listener.getsockname()[1], len(of_ranks), world_size, "one", 10, "cpu")

    def joined(rank: int) -> Communicator:
        end = Communicator(meeting, rank, torch.device("cpu"), listener if rank == 0 else None)
        end.join()
        return end

    def send(rank: int) -> None:
        end = joined(rank)
        Sender(plan, end).send(1, iter(of_ranks[rank].items()))
        end.exchange("done")

    with ThreadPoolExecutor(len(of_ranks)) as threads:
        sending = [threads.submit(send, rank) for rank in range(len(of_ranks))]
        end = joined(len(of_ranks))
        agree_on_manifest(plan, 1, end, None)
        staged = Receiver(plan, needs, end).receive(1)
        end.exchange("done")
        for one in sending:
            one.result()
    return staged


def test_a_bucket_is_kept_only_where_most_of_it_is_needed_as_it_is() -> None:
    """A norm beside halves of a matrix, which come from two senders and are put together, keeps no bucket."""
    norm = PieceSpec("norm", "float32", (8,), 0, 0, 0, 8)
    halves = [PieceSpec("wide", "float32", (8, 512), rank, 1, 256 * rank, 256) for rank in range(2)]
    needs = {"norm": (whole((8,)),), "wide": (whole((8, 512)),)}
    of_ranks = [{"norm": torch.arange(8.0), "wide": torch.ones(8, 256)}, {"wide": torch.zeros(8, 256)}]
    plan = Manifest(1 << 20, (norm, *halves))
    staged = between(plan, needs, of_ranks)
    assert torch.equal(staged.boxes["norm"][whole((8,))], torch.arange(8.0))
    memories = {
        box.untyped_storage().data_ptr(): box.untyped_storage().nbytes()
        for boxes in staged.boxes.values()
        for box in boxes.values()
    }
    assert sum(memories.values()) == staged.num_bytes
