"""What no shard holds of a state travels to ranks without the state, of the same kinds."""

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor

from rto_megatron.engine.plain_values import plain_state, plain_text


def test_plain_values_come_back_and_shards_stay() -> None:
    shard = ShardedTensor.from_rank_offsets("weight", torch.ones(2))
    group = {"lr": 0.1 + 0.2, "betas": (0.9, 0.95), "params": [0, 1], "fused": None, "is_decayed": True}
    state = {
        "model": {"weight": shard},
        "optimizer": {
            "state": {0: {"exp_avg": shard}, "common_step": torch.tensor(3.0)},
            "param_groups": [group, {"step": 7}],
            "note": LocalNonpersistentObject("of this rank"),
        },
    }
    plain = plain_state(plain_text(state))
    optimizer = plain["optimizer"]
    assert optimizer["param_groups"] == [group, {"step": 7}]
    assert isinstance(optimizer["param_groups"][0]["betas"], tuple)
    step = optimizer["state"]["common_step"]
    assert (step.dtype, float(step)) == (torch.float32, 3.0)
    assert "weight" not in plain.get("model", {})
    assert "note" not in optimizer and "exp_avg" not in optimizer["state"].get(0, {})
    assert state["model"]["weight"] is shard  # the state itself is whole
