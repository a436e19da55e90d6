"""The two runs of `rto resume-check`: 2k steps, and the same from the checkpoint of step k on, in other processes.

The first half is run once: it ends in the checkpoint of step k, which is all that the second run gets of it.
Responses do not come from a pool but from a script of (version, prompt), so both runs, at any layout, see the same.
"""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rto_megatron.config import load, schema
from rto_megatron.config.facts import facts_of
from rto_megatron.config.training import RolloutRunConfig, TrainParallelConfig
from rto_megatron.engine.saving import point_to
from rto_megatron.errors import RecipeError
from rto_megatron.generation.contract import Sampling
from rto_megatron.generation.scripted import ScriptedEngine
from rto_megatron.parallel.collectives import Json
from rto_megatron.storage.checkpoints import CHECKPOINTS
from rto_megatron.storage.file_digests import checkpoint_name
from rto_megatron.storage.megatron_folder import HF_FILES
from rto_megatron.trainer.run_moment import MOMENT_FILE
from rto_megatron.types import Prompt, Rollout

if TYPE_CHECKING:
    from rto_megatron.parallel.topology import Topology

OBSERVED = "observed"  # <run>/observed/<rank>.json: generators at the end, and every request to the script


def read_config(path: Path, overrides: Sequence[str]) -> schema.TrainStage:
    """The stage of a recipe, or of a run folder with the configuration that the run saved.

    Raises:
        RecipeError: as `load_recipe`; or the stage trains nothing.
    """
    config = load.load_recipe(path / "config.yaml" if path.is_dir() else path, overrides)
    training = facts_of(config).training
    if training is None:
        raise RecipeError(
            f"stage {config.stage} trains nothing, so there is nothing to resume; name a training stage"
        )
    return training


def whole_run(config: schema.TrainStage, k: int, run_dir: Path) -> schema.TrainStage:
    """The configuration of the run of 2k steps, saved in its folder; it leaves checkpoints of steps k and 2k."""
    run = config.run.model_copy(
        update={"dir": run_dir, "steps": 2 * k, "save_every": k, "keep_checkpoints": 2}
    )
    if isinstance(run, RolloutRunConfig):
        run = run.model_copy(update={"samples_every": None})
    changed = config.model_copy(update={"run": run})
    if (online := facts_of(changed).online) is not None:
        # The script's own probabilities are not the policy's.
        rollout = online.rollout.model_copy(update={"logprob_gap_alarm": None})
        changed = changed.model_copy(update={"rollout": rollout})
    load.save(changed, run_dir)
    return changed


def resumed_run(
    whole: schema.TrainStage, k: int, run_dir: Path, parallel: TrainParallelConfig
) -> schema.TrainStage:
    """The configuration of the second run, with its folder as an attempt leaves it that is killed after step k."""
    checkpoint = run_dir / CHECKPOINTS / checkpoint_name(k)
    shutil.copytree(whole.run.dir / CHECKPOINTS / checkpoint_name(k), checkpoint)
    point_to(checkpoint)
    for files in checkpoint.glob(f"*/{HF_FILES}"):
        shutil.copytree(files, run_dir / "model_files" / files.parent.name)
    shutil.copy(whole.run.dir / "metrics.jsonl", run_dir)
    if (moment := whole.run.dir / MOMENT_FILE).exists():
        shutil.copy(moment, run_dir)
    run = whole.run.model_copy(update={"dir": run_dir})
    changed = whole.model_copy(update={"run": run, "parallel": parallel})
    load.save(changed, run_dir)
    return changed


class ScriptedPool(ScriptedEngine):
    """Answers by (version, prompt, how often it was asked), wherever a layout asks; notes every request.

    Example:
        ScriptedPool(vocab_size=64).generate(prompts, sampling, version=0)
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.requests: list[Json] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        self.requests.append(
            {"version": version, "seed": sampling.seed, "prompts": [prompt.id for prompt in prompts]}
        )
        asked: Counter[str] = Counter()
        drawn: list[Rollout] = []
        for prompt in prompts:
            drawn += super().generate([prompt], replace(sampling, seed=asked[prompt.id]), version)
            asked[prompt.id] += 1
        return drawn


class ScriptedPush:
    """Tells the script of a new version, without weights.

    Example:
        ScriptedPush(ScriptedPool(64))(3)
    """

    def __init__(self, pool: ScriptedPool | None) -> None:
        self._pool = pool

    def __call__(self, version: int) -> dict[str, float]:
        """Nothing to measure."""
        if self._pool is not None:
            self._pool.hold(version)
        return {}

    def close(self) -> None:
        """Nothing to leave."""


def train_scripted(config: schema.TrainStage, topology: "Topology") -> ScriptedPool | None:
    """Trains as one rank, from the checkpoint if there is one; the pool is the one of a replica lead that samples."""
    from rto_megatron.engine.source import find_source
    from rto_megatron.trainer.connected_pool import ConnectedPool
    from rto_megatron.trainer.offline import train_offline
    from rto_megatron.trainer.online import train_online

    pool, facts = None, facts_of(config)
    if facts.online is not None:
        source = find_source(config.models.policy, False, config.models.random_init, "models.policy")
        pool = ScriptedPool(source.shape().vocab_size) if topology.is_replica_lead else None
        train_online(facts.online, topology, ConnectedPool(pool, ScriptedPush(pool)))
    elif facts.offline is not None:
        train_offline(facts.offline, topology)
    return pool


def run_observed(config: schema.TrainStage) -> None:
    """Trains as one rank, and writes down what no checkpoint holds."""
    from rto_megatron.platform.device import prepare
    from rto_megatron.trainer.stages import ranks

    with ranks(prepare(config.precision), config.parallel, config.run.seed) as topology:
        from rto_megatron.parallel.seeds import generator_states

        pool = train_scripted(config, topology)
        folder = config.run.dir / OBSERVED
        folder.mkdir(exist_ok=True)
        observed = {"generators": generator_states(), "requests": pool.requests if pool else []}
        (folder / f"{topology.rank:05d}.json").write_text(json.dumps(observed))
        topology.barrier()
