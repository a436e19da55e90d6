"""No loss depends on how its examples are laid out: every registered method, packed, padded, cut and reordered.

A table stands in for the model: the outputs of a sequence are fixed by its tokens, wherever the sequence lands.

A method that couples the examples of a batch, as KTO does through its baseline, has the invariances that are tested
here because the coupling number is computed over the whole global batch first and is an input of the loss. It has not
the one that is not tested: a global batch that is split into two optimizer steps has two baselines. The same holds
for the whitening and the groups of sampled responses, which `credit` computes before micro-batches exist.
"""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from algorithms.grids import GARBAGE, grid, no_reduction
from algorithms.ragged import CPU, DELIMITER, scored_rollouts, step_minibatches

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OfflineMethod
from rto_megatron.data.packing import (
    Layout,
    judged_microbatches,
    pair_microbatches,
    supervised_microbatches,
)
from rto_megatron.types import Demonstration, JudgedResponse, PreferencePair

OFFLINE = [name for name, method in ALGORITHMS.items() if isinstance(method, OfflineMethod)]
ONLINE = [name for name in ALGORITHMS if name not in OFFLINE]
NUM_EXAMPLES = 7
CAP = 1.2  # of the importance of the pool's tokens, whose log-probs lie about 1 nat from the trainer's
ORDER = [4, 0, 6, 2, 5, 1, 3]
# name -> (micro-batch size, packed, row lengths are a multiple of, order of the examples)
ONE_BATCH = (NUM_EXAMPLES, True, 1, range(NUM_EXAMPLES))
LAYOUTS = {
    "trailing padding": (NUM_EXAMPLES, True, 16, range(NUM_EXAMPLES)),
    "padded": (NUM_EXAMPLES, False, 1, range(NUM_EXAMPLES)),
    "padded to a multiple": (3, False, 8, range(NUM_EXAMPLES)),
    "one by one": (1, True, 1, range(NUM_EXAMPLES)),
    "by twos": (2, True, 4, range(NUM_EXAMPLES)),
    "reordered": (NUM_EXAMPLES, True, 1, ORDER),
    "reordered, padded, by threes": (3, False, 1, ORDER),
}


class Table:
    """Random outputs for every position of every sequence it meets, the same each time; they collect gradients."""

    def __init__(self, num_rows=1):
        self.num_rows = num_rows
        self.outputs = {}

    def of(self, batch, padding):
        """[T], or [num_rows, T], with `padding` where no sequence is."""
        pieces, end = [], 0
        for (start, stop), last in zip(pairwise(batch.cu_seqlens), batch.last_positions, strict=False):
            ids = tuple(batch.tokens_T[start : last + 1].tolist())
            if ids not in self.outputs:
                generator = torch.Generator().manual_seed(random.Random(str(ids)).randrange(2**31))
                drawn = torch.randn(self.num_rows, len(ids), generator=generator, dtype=torch.float64)
                self.outputs[ids] = drawn.requires_grad_()
            own = self.outputs[ids]
            pieces += [own, torch.full((self.num_rows, stop - start - own.shape[1]), padding).double()]
            end = stop
        pieces.append(torch.full((self.num_rows, batch.cu_seqlens[-1] - end), padding).double())
        whole = torch.cat(pieces, dim=1)
        assert whole.shape[1] == batch.cu_seqlens[-1]
        return whole[0] if self.num_rows == 1 else whole

    def gradients(self):
        """Tokens of a sequence -> gradients of its outputs."""
        return {ids: own.grad for ids, own in self.outputs.items()}


def in_float64(micro):
    """A micro-batch whose weights, all the same float32 numbers, are summed without rounding."""
    fields = vars(micro).items()
    return replace(
        micro, **{name: x.double() for name, x in fields if torch.is_tensor(x) and x.is_floating_point()}
    )


def run(loss, microbatches, num_rows, padding=GARBAGE):
    """Summed loss, gradients by sequence, and summed metrics."""
    table, total, metrics = Table(num_rows), 0.0, {}
    for micro in map(in_float64, microbatches):
        output = loss(table.of(micro.batch, padding), micro)
        output.loss.backward()
        total += output.loss.item()
        for name, (value, count) in output.metrics.items():
            before = metrics.get(name, (0.0, 0.0))
            metrics[name] = (before[0] + value, before[1] + count)
    return total, table.gradients(), metrics


def assert_same(one, other):
    (loss, gradients, metrics), (other_loss, other_gradients, other_metrics) = one, other
    assert loss == pytest.approx(other_loss, rel=1e-9, abs=1e-12)
    assert gradients.keys() == other_gradients.keys()
    for ids, gradient in gradients.items():
        torch.testing.assert_close(gradient, other_gradients[ids], rtol=1e-9, atol=1e-12)
    assert metrics.keys() == other_metrics.keys()
    for name, value in metrics.items():
        assert value == pytest.approx(other_metrics[name], rel=1e-9, abs=1e-12), name


def examples_of(kind):
    """Examples whose sequences all differ, with prompts and answers of unequal lengths."""
    rng = random.Random(3)

    def ids(most):
        return tuple(rng.randrange(3, 90) for _ in range(rng.randint(1, most)))

    made = []
    for number in range(NUM_EXAMPLES):
        name, prompt = str(number), (100 + number, *ids(4))
        if kind == "demonstrations":
            made.append(Demonstration(name, prompt, ids(7)))
        elif kind == "pairs":
            made.append(PreferencePair(name, prompt, (91, *ids(7)), (92, *ids(7)), rng.random()))
        else:
            made.append(JudgedResponse(name, prompt, ids(7), number % 3 == 0, (93,)))
    return made


def offline_microbatches(kind, examples, layout, denominator):
    """The micro-batches of a share of the global batch; the references are fixed by the example."""

    def reference(example, answer):
        return -1.5 * len(answer) - 0.1 * int(example.id)

    if kind == "demonstrations":
        return supervised_microbatches(examples, denominator, layout)
    if kind == "pairs":
        logp_ref_G2 = grid([[reference(e, e.chosen_ids), reference(e, e.rejected_ids)] for e in examples])
        return pair_microbatches(examples, logp_ref_G2, denominator, layout)
    logp_ref_G = grid([reference(e, e.response_ids) for e in examples])
    return judged_microbatches(examples, logp_ref_G, grid(0.4), denominator, layout)


def denominator_of(kind, examples):
    if kind == "demonstrations":
        return sum(len(e.response_ids) for e in examples)
    return len(examples)


def run_offline(name, micro, packed, multiple_of, order, padding=GARBAGE, num_shares=1):
    method = ALGORITHMS[name]
    examples = examples_of(method.examples)
    denominator = denominator_of(method.examples, examples)
    ordered = [examples[number] for number in order]
    layout = Layout(micro, packed, multiple_of, CPU)
    microbatches = [
        microbatch
        for rank in range(num_shares)
        for microbatch in offline_microbatches(
            method.examples, ordered[rank::num_shares], layout, denominator
        )
    ]
    num_rows = 3 if method.outputs == "divergence" else 1
    return run(method.build(method.config()).loss, microbatches, num_rows, padding)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OFFLINE)
def test_offline_losses_do_not_depend_on_the_layout(name, layout):
    one = run_offline(name, *ONE_BATCH)
    assert any(gradient.any() for gradient in one[1].values())
    assert_same(run_offline(name, *LAYOUTS[layout]), one)


@pytest.mark.parametrize("name", OFFLINE)
def test_shares_of_two_replicas_add_up_to_the_whole(name):
    assert_same(
        run_offline(name, 2, True, 4, range(NUM_EXAMPLES), num_shares=2), run_offline(name, *ONE_BATCH)
    )


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", OFFLINE)
def test_offline_losses_never_read_the_padding(name, packed):
    arranged = (NUM_EXAMPLES, packed, 16, range(NUM_EXAMPLES))
    one = run_offline(name, *arranged, padding=0.0)
    for padding in (GARBAGE, -GARBAGE):
        other = run_offline(name, *arranged, padding=padding)
        assert one[0] == other[0]
        assert all(torch.equal(gradient, other[1][ids]) for ids, gradient in one[1].items())


def online(name, cap=None):
    method = ALGORITHMS[name]
    return method.build(method.config(pool_importance_cap=cap), lambda _: frozenset({DELIMITER}))


def num_rollouts(algorithm):
    samples = algorithm.config.samples_per_prompt
    return samples * max(2, NUM_EXAMPLES // samples + 1)


def experience_of(algorithm):
    return algorithm.credit(scored_rollouts(num_rollouts(algorithm), cut=(1, 5)), 0.01, no_reduction)


def run_online(algorithm, loss, experience, micro, packed, multiple_of, rows, padding=GARBAGE):
    microbatches = step_minibatches(
        experience, algorithm.config.loss_weights, rows, micro, packed, multiple_of
    )
    total = sum(float(m.weight_T.sum()) for m in microbatches)
    assert total == pytest.approx(1) or algorithm.config.loss_weights == "constant"
    return run(loss, microbatches, 1, padding)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize("name", ONLINE)
def test_online_losses_do_not_depend_on_layout_and_order(name, cap, layout):
    algorithm = online(name, cap)
    experience = experience_of(algorithm)
    rows = list(range(len(experience.rollouts)))
    micro, packed, multiple_of, order = LAYOUTS[layout]
    shuffled = rows if order == range(NUM_EXAMPLES) else random.Random(1).sample(rows, len(rows))
    for loss in (algorithm.policy_loss, algorithm.value_loss):
        if loss is None:
            assert not ALGORITHMS[name].has_critic
            continue
        one = run_online(algorithm, loss, experience, len(rows), True, 1, rows)
        assert any(gradient.any() for gradient in one[1].values())
        other = run_online(algorithm, loss, experience, micro, packed, multiple_of, shuffled)
        assert_same(other, one)
        assert all(total > 0 for key, (total, _) in one[2].items() if key.endswith("clipfrac_avg"))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize("name", ONLINE)
def test_online_losses_never_read_the_padding(name, cap, packed):
    algorithm = online(name, cap)
    experience = experience_of(algorithm)
    rows = range(len(experience.rollouts))
    losses = [loss for loss in (algorithm.policy_loss, algorithm.value_loss) if loss is not None]
    for loss in losses:
        one = run_online(algorithm, loss, experience, len(rows), packed, 16, rows, padding=0.0)
        for padding in (GARBAGE, -GARBAGE):
            other = run_online(algorithm, loss, experience, len(rows), packed, 16, rows, padding=padding)
            assert one[0] == other[0]
            assert all(torch.equal(gradient, other[1][ids]) for ids, gradient in one[1].items())


@pytest.mark.parametrize("name", ONLINE)
def test_credit_does_not_depend_on_what_stands_behind_the_responses(name):
    algorithm = online(name, CAP)
    count = num_rollouts(algorithm)
    clean, *dirty = (
        algorithm.credit(scored_rollouts(count, padding=padding, cut=(1, 5)), 0.01, no_reduction)
        for padding in (0.0, GARBAGE, -GARBAGE)
    )
    for other in dirty:
        for one_BR, other_BR in (
            (clean.rewards.total_BR(), other.rewards.total_BR()),
            (clean.advantages_BR, other.advantages_BR),
            (clean.returns_BR, other.returns_BR),
        ):
            assert torch.equal(one_BR, other_BR)
            assert not other_BR[other.mask_BR == 0].any()
            assert other_BR.any()
        assert clean.rewards.num_clipped == other.rewards.num_clipped
        assert torch.equal(clean.pool_importance_BR, other.pool_importance_BR)
        assert (other.pool_importance_BR == CAP).any()


@pytest.mark.parametrize("name", ONLINE)
def test_credit_on_a_wider_grid_is_the_same(name):
    algorithm = online(name, CAP)
    scored = scored_rollouts(num_rollouts(algorithm), cut=(1, 5))
    behind = {
        "mask_BR": 0.0,
        "sampled_BR": 0.0,
        "logp_pool_BR": -GARBAGE,
        "logp_old_BR": GARBAGE,
        "logp_ref_BR": -GARBAGE,
        "dpo_logratio_BR": GARBAGE,
        "values_BR": -GARBAGE,
    }
    wider = {
        field: torch.nn.functional.pad(vars(scored)[field], (0, 3), value=value)
        for field, value in behind.items()
    }
    one = algorithm.credit(scored, 0.01, no_reduction)
    other = algorithm.credit(replace(scored, **wider), 0.01, no_reduction)
    width = scored.mask_BR.shape[1]
    for one_BR, other_BR in (
        (one.rewards.total_BR(), other.rewards.total_BR()),
        (one.advantages_BR, other.advantages_BR),
        (one.returns_BR, other.returns_BR),
    ):
        torch.testing.assert_close(other_BR[:, :width], one_BR, rtol=1e-9, atol=1e-12)
        assert not other_BR[:, width:].any()
    assert torch.equal(other.pool_importance_BR[:, :width], one.pool_importance_BR)
