"""The planner against published steps: which of them its constants were fitted on, and which it had not seen.

Sources are those of docs/planning.md. TF is 10^12 floating-point operations a second and GPU.
"""

from dataclasses import replace

import pytest

from rto_megatron.models.model_flops import forward_flops
from rto_megatron.models.shape import ModelShape
from rto_megatron.planning.gpus import KNOWN_GPUS
from rto_megatron.planning.shapes import KNOWN_SHAPES
from rto_megatron.planning.step_time import EXPECTED, Efficiency, PoolServers, forward_s, push_s, training_s

H100, H200 = KNOWN_GPUS["h100"], KNOWN_GPUS["h200"]
LLAMA_8B, LLAMA_70B = KNOWN_SHAPES["llama-3-8b"], KNOWN_SHAPES["llama-3-70b"]
LLAMA_405B = replace(LLAMA_70B, num_layers=126, hidden_size=16384, ffn_hidden_size=53248, num_heads=128)
QWEN_32B = replace(
    KNOWN_SHAPES["qwen3-1.7b"],
    num_layers=64,
    hidden_size=5120,
    ffn_hidden_size=25600,
    num_heads=64,
    is_tied=False,
)


@pytest.mark.parametrize(
    ("shape", "tokens_per_s", "tflops"),
    [(LLAMA_8B, 14_451, 744), (LLAMA_70B, 1_602, 719), (LLAMA_405B, 292, 737)],
    ids=["P1", "P2", "P3"],
)
def test_operations_of_training_are_those_that_were_published(
    shape: ModelShape, tokens_per_s: float, tflops: float
) -> None:
    """Megatron-Bridge 25.11, docs/performance-summary.md: sequences of 8,192 tokens."""
    per_token = 3 * forward_flops(shape, False, [8192]) / 8192
    assert tokens_per_s * per_token / 1e12 == pytest.approx(tflops, rel=0.005)


@pytest.mark.parametrize(
    ("shape", "published"),
    [(LLAMA_8B, 14_451), (LLAMA_70B, 1_602), (LLAMA_405B, 292)],
    ids=["P1", "P2", "P3"],
)
def test_training_in_8_bits_is_as_fast_as_was_published(shape: ModelShape, published: float) -> None:
    """The same page, tokens a second of a GPU: bf16's share of its products, layers in 8 bits twice as fast."""
    by = replace(EXPECTED, layers=2.0)
    seconds = training_s([(shape, False)], [8192], H100, 1, by, is_recomputed=False)
    assert 8192 / seconds == pytest.approx(published, rel=0.15)


def test_training_in_bf16_is_as_fast_as_was_published() -> None:
    """P4: torchtitan, benchmarks/llama3_h100_202412: Llama-3.1-8B over FSDP, tokens a second of an H100."""
    seconds = training_s([(LLAMA_8B, False)], [8192], H100, 1, EXPECTED, is_recomputed=False)
    assert 8192 / seconds == pytest.approx(6_667, rel=0.20)


# (id, servers, prompt, response, published tokens a second of a server); 8-bit weights and caches but for P5's.
DECODES = [
    ("P5", PoolServers(LLAMA_8B, H100, 1, most_sequences=256), 256, 256, 11_400),
    ("P6 H100 128/2048", PoolServers(LLAMA_8B, H100, 1, 1, 1, 1), 128, 2048, 22_714),
    ("P6 H100 1000/1000", PoolServers(LLAMA_8B, H100, 1, 1, 1, 1), 1000, 1000, 15_220),
    ("P6 H100 2048/2048", PoolServers(LLAMA_8B, H100, 1, 1, 1, 1), 2048, 2048, 9_305),
    ("P6 H200 128/2048", PoolServers(LLAMA_8B, H200, 1, 1, 1, 1), 128, 2048, 26_221),
    ("P6 H200 1000/1000", PoolServers(LLAMA_8B, H200, 1, 1, 1, 1), 1000, 1000, 17_744),
    ("P6 H200 2048/2048", PoolServers(LLAMA_8B, H200, 1, 1, 1, 1), 2048, 2048, 12_194),
    ("P7", PoolServers(LLAMA_70B, H100, 1, 2, 1, 1), 1000, 1000, 4_205),
]


@pytest.mark.parametrize(
    ("servers", "prompt", "response", "published"), [p[1:] for p in DECODES], ids=[p[0] for p in DECODES]
)
def test_decoding_is_within_30_percent(
    servers: PoolServers, prompt: int, response: int, published: float
) -> None:
    responses = 100_000
    seconds = servers.sampling_s(responses, prompt, response, response, EXPECTED)
    assert responses * response / seconds == pytest.approx(published, rel=0.30)


def grpo_8b(by: Efficiency) -> float:
    """P8: GRPO of Llama-3.1-8B on 16 H100, 2,048 responses of 1,019 tokens and at most 4,096, recomputed."""
    lengths = [1019] * 2048
    pool = PoolServers(KNOWN_SHAPES["llama-3.1-8b"], H100, num=16)
    models = [(LLAMA_8B, False)]
    return (
        pool.sampling_s(2048, 0, 1019, 4096, by)
        + 2 * forward_s(models, lengths, H100, 16, by)
        + training_s(models, lengths, H100, 16, by, is_recomputed=True)
    )


def grpo_32b(by: Efficiency) -> float:
    """P9: GRPO of Qwen3-32B on 32 H100, 2,048 responses of 3,251 tokens; pool and trainer at tensor 4.

    The longest response is not published: the pool's throughput is taken alone, which up to 8,192 tokens is 2 % off.
    """
    lengths = [3251] * 2048
    pool = PoolServers(QWEN_32B, H100, num=8, tensor=4)
    models = [(QWEN_32B, False)]
    return (
        pool.sampling_s(2048, 0, 3251, 3251, by)
        + 2 * forward_s(models, lengths, H100, 32, by)
        + training_s(models, lengths, H100, 32, by, is_recomputed=True)
    )


def test_each_of_two_whole_steps_is_predicted_with_the_factor_of_the_other() -> None:
    """NeMo-RL 0.5: 92.8 s and 376 s. What a step takes beside its work is fitted on one, and the other is held out."""
    bare_8b, bare_32b = grpo_8b(EXPECTED), grpo_32b(EXPECTED)
    assert bare_8b * 376 / bare_32b == pytest.approx(92.8, rel=0.10)
    assert bare_32b * 92.8 / bare_8b == pytest.approx(376, rel=0.10)
    # And the constant, which was fitted on both.
    assert bare_8b * EXPECTED.overhead == pytest.approx(92.8, rel=0.10)
    assert bare_32b * EXPECTED.overhead == pytest.approx(376, rel=0.10)


def ppo_70b(nodes: int) -> float:
    """P10: PPO of Llama-3-70B, 1,024 rollouts of some 340 tokens, sampled eight at a time by replicas of eight H100.

    Batches are static: each goes on until its longest response ends, whose length is not published; 1,024 is assumed.
    """
    gpus = 8 * nodes
    pool = PoolServers(LLAMA_70B, H100, num=nodes, tensor=8)
    batches = 1024 / 8 / nodes
    sampling = batches * 1024 * pool.decode_s(8, 340 + 512, EXPECTED)
    models, lengths = [(LLAMA_70B, False)], [340 + 340] * 1024
    passes = 2 * forward_s(models, lengths, H100, gpus, EXPECTED)
    return (
        sampling + passes + training_s(models, lengths, H100, gpus, EXPECTED, is_recomputed=False)
    ) * EXPECTED.overhead


@pytest.mark.parametrize(("nodes", "published"), [(8, 366.7), (16, 190.4)])
def test_static_batches_take_as_long_as_was_published_on_few_nodes(nodes: int, published: float) -> None:
    """NeMo-Aligner, rlhf.rst: nodes of the actor, beside half as many of the critic, which works at the same time."""
    assert ppo_70b(nodes) == pytest.approx(published, rel=0.35)


def test_an_update_takes_three_times_a_forward() -> None:
    """P14, verl one_step_off.md: 344 s over 119 s, 2.89."""
    models, lengths = [(LLAMA_8B, False)], [4096] * 64
    ratio = training_s(models, lengths, H100, 16, EXPECTED, False) / forward_s(
        models, lengths, H100, 16, EXPECTED
    )
    assert 2.5 < ratio < 3.5


@pytest.mark.parametrize(
    ("num_bytes", "gb_per_s", "control_s", "published"),
    [(16.1e9, 47.8, 0.0, 0.337), (61e9, 8.25, 0.0, 7.0), (470e9, 75.6, 0.0, 6.22)],
    ids=["P15", "P16", "P17"],
)
def test_weights_travel_at_a_wire_s_speed(
    num_bytes: float, gb_per_s: float, control_s: float, published: float
) -> None:
    by = Efficiency(push_gb_per_s=gb_per_s, push_control_s=control_s)
    assert push_s(num_bytes, by) == pytest.approx(published, rel=0.20)
