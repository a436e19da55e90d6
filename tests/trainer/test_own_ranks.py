"""Critic and policy on ranks of their own take their gradients at the same time, and what one finds stops both."""

import time
from collections.abc import Callable
from pathlib import Path

from ranks import run_ranks
from torch import Tensor
from trainer.tiny_runs import ENGINE_VOCAB, HeldPush, configure, join

from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.generation.scripted import ScriptedEngine
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.guard import Guard, LossChange, Update
from rto_megatron.trainer.online import train_online
from rto_megatron.trainer.parts import Parts
from rto_megatron.types import LossOutput

_LIMIT_S = 60.0


class MeetingGuard(Guard):
    """A loss of one model is given only when the other model's was asked for."""

    def loss_change(self, update: Update) -> LossChange:
        """See `Guard.loss_change`."""
        change, folder = super().loss_change(update), self._run.dir
        own, other = ("policy", "critic") if update.is_paced else ("critic", "policy")

        def meet[M](loss: Callable[[Tensor, M], LossOutput]) -> Callable[[Tensor, M], LossOutput]:
            def met(outputs: Tensor, micro: M) -> LossOutput:
                (folder / f"{own}.asked").touch()
                end = time.monotonic() + _LIMIT_S
                while not (folder / f"{other}.asked").exists():
                    assert time.monotonic() < end, f"the {other} waits for the {own}"
                    time.sleep(0.01)
                return loss(outputs, micro)

            return change(met)

        return meet


def _train(config: ReinforcementStage) -> None:
    place = join(config)
    engine = ScriptedEngine(ENGINE_VOCAB) if place.is_replica_lead else None
    pool = ConnectedPool(engine, HeldPush(engine))
    train_online(config, place, pool, Parts(guard=MeetingGuard))


def test_no_model_waits_for_the_gradients_of_another(files: Path, tmp_path: Path) -> None:
    own = {"critic": {"ranks": "1"}, "reward": {"ranks": "1"}}
    config = configure("ppo", files, tmp_path, run__steps=1, run__save_every=None, parallel__roles=own)
    run_ranks(2, _train, config)
    (metrics,) = read_metrics(tmp_path)
    assert metrics["critic/grad_norm"] > 0 and metrics["policy/grad_norm"] > 0
    assert metrics["update/skipped_fraction"] == 0
