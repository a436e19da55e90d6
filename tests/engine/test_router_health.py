"""Router metrics against a slow count of the definition."""

import math

import pytest
import torch

from rto_megatron.engine.router_health import health_of


def _by_definition(choices: list[list[list[int]]], chances: list[list[list[float]]], num_experts: int):
    """Of layer -> token -> experts that it passed, and its distribution."""
    loads, entropies, tokens = [], [], 0
    for layer, layer_chances in zip(choices, chances, strict=True):
        got = [sum(expert in token for token in layer) for expert in range(num_experts)]
        mean = sum(got) / num_experts
        loads.append([one / mean for one in got])
        entropies += [-sum(p * math.log(p) for p in token if p) for token in layer_chances]
        tokens += len(layer)
    shares = [[load / num_experts for load in layer] for layer in loads]
    evenness = [-sum(p * math.log(p) for p in layer if p) / math.log(num_experts) for layer in shares]
    return {
        **{f"load/{e:03d}": sum(layer[e] for layer in loads) / len(loads) for e in range(num_experts)},
        "load_max": sum(map(max, loads)) / len(loads),
        "load_min": sum(map(min, loads)) / len(loads),
        "load_entropy": sum(evenness) / len(loads),
        "idle_fraction": sum(load == 0 for layer in loads for load in layer) / (len(loads) * num_experts),
        "entropy": sum(entropies) / tokens,
    }


def test_health_is_its_definition() -> None:
    choices = [[[0, 1], [0, 2], [0, 1]], [[1, 2], [2, 3], [3, 0]]]
    chances = [
        [[0.4, 0.3, 0.2, 0.1], [0.5, 0.1, 0.4, 0.0], [0.6, 0.4, 0.0, 0.0]],
        [[0.1, 0.4, 0.4, 0.1], [0.0, 0.0, 0.5, 0.5], [0.3, 0.2, 0.1, 0.4]],
    ]
    counts = torch.zeros(2, 6, dtype=torch.float64)
    for layer, tokens in enumerate(choices):
        for token in tokens:
            counts[layer, token] += 1
        counts[layer, 4] = sum(-sum(p * math.log(p) for p in one if p) for one in chances[layer])
        counts[layer, 5] = len(tokens)
    assert health_of(counts, per_token=2) == pytest.approx(_by_definition(choices, chances, 4))


def test_balance_and_collapse() -> None:
    even = health_of(torch.tensor([[8.0, 8.0, 8.0, 8.0, 0.0, 16.0]], dtype=torch.float64), 2)
    assert (even["load_max"], even["load_min"], even["load_entropy"]) == pytest.approx((1, 1, 1))
    one = health_of(torch.tensor([[16.0, 0.0, 0.0, 0.0, 0.0, 16.0]], dtype=torch.float64), 1)
    assert (one["load_max"], one["load_entropy"], one["idle_fraction"]) == pytest.approx((4, 0, 0.75))
