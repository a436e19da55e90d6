"""What every stage does before its first step: sources, layout checks, tokenizer, optimizer steps."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.config import checks, schema
from rto_megatron.data.loader import Limits
from rto_megatron.data.packing import Layout
from rto_megatron.data.tokenizer import encoding_fingerprint, load_tokenizer
from rto_megatron.engine.source import SCALAR_ROLES, WeightSource, find_source, latest_checkpoint
from rto_megatron.errors import UserError
from rto_megatron.models.shape import check_layout
from rto_megatron.parallel.topology import Topology
from rto_megatron.trainer.report.progress import say


@dataclass(frozen=True)
class Setup:
    """A stage's surroundings, checked."""

    topology: Topology
    sources: dict[str, WeightSource]  # role -> where its weights are
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    limits: Limits

    @property
    def eos_id(self) -> int:
        """The token that ends a response."""
        return int(self.tokenizer.eos_token_id)


def prepare_stage(config: schema.Stage, topology: Topology) -> Setup:
    """Finds every role's weights and checks them against the layout and against each other.

    Raises:
        UserError: all problems at once.
    """
    sources = find_sources(config)
    shapes = {role: source.shape() for role, source in sources.items()}
    parallel = config.parallel
    checks.refuse(
        [
            *(
                p
                for role, shape in shapes.items()
                for p in check_layout(shape, parallel.tensor, parallel.pipeline, f"models.{role}")
            ),
            *_unlike_tokenizers(sources),
            *checks.find_problems(
                config, topology.world_size, {role: shape.max_positions for role, shape in shapes.items()}
            ),
        ]
    )
    for warning in _missing_scales(sources):
        say(warning, topology.is_lead)
    tokenizer = load_tokenizer(sources["policy"].hf_folder)
    batch, device = config.batch, topology.device.torch_device
    layout = Layout(batch.micro, batch.packed, topology.row_multiple, device)
    # Prompts without answers have no such limit.
    max_length = config.data.max_length if isinstance(config.data, schema.ExampleDataConfig) else sys.maxsize
    limits = Limits(config.data.max_prompt_tokens, max_length, config.data.overlong)
    return Setup(topology, sources, tokenizer, layout, limits)


def find_sources(config: schema.Stage) -> dict[str, WeightSource]:
    """Role -> source of every model that the stage needs; unnamed ones follow the schema's defaults."""
    models = config.models

    def language(path: Path, role: str, is_random: bool = False) -> WeightSource:
        return find_source(path, False, is_random, f"models.{role}")

    def scalar(path: Path, role: str) -> WeightSource:
        return find_source(path, True, False, f"models.{role}")

    sources = {"policy": language(models.policy, "policy", models.random_init)}
    if isinstance(config, schema.DpoStage | schema.PpoStage | schema.EvaluateStage):
        sources["reference"] = language(models.reference or models.policy, "reference")
    if isinstance(config, schema.PpoStage) or (isinstance(config, schema.EvaluateStage) and models.reward):
        sources["reward"] = scalar(_named(models.reward, "reward"), "reward")
    if isinstance(config, schema.PpoStage):
        sources["critic"] = scalar(models.critic or _named(models.reward, "reward"), "critic")
    if isinstance(config, schema.PpoStage) and ALGORITHMS[config.stage](config.algorithm).needs_dpo:
        sources["dpo"] = language(_named(models.dpo, "dpo"), "dpo")
        if models.dpo_reference not in (None, models.reference or models.policy):
            sources["dpo_reference"] = language(
                _named(models.dpo_reference, "dpo_reference"), "dpo_reference"
            )
    return sources


def _named(path: Path | None, role: str) -> Path:
    if path is None:
        raise UserError(
            f"models.{role} is not set, and this stage needs it; name a run folder or a Hugging Face folder"
        )
    return path


def _unlike_tokenizers(sources: dict[str, WeightSource]) -> list[str]:
    first_role, first = next(iter(sources.items()))
    # Roles often share a folder, and a large tokenizer takes a second to load.
    fingerprints = {
        folder: encoding_fingerprint(folder) for folder in {s.hf_folder for s in sources.values()}
    }
    return [
        f"models.{role}: the tokenizer in {source.hf_folder} differs from the one of models.{first_role} in "
        f"{first.hf_folder}; the roles exchange token ids, so both need the same pieces, merges and end-of-sequence id"
        for role, source in sources.items()
        if fingerprints[source.hf_folder] != fingerprints[first.hf_folder]
    ]


def _missing_scales(sources: dict[str, WeightSource]) -> list[str]:
    return [
        f"warning: models.{role}: {source.hf_folder}/config.json has no mean and std, so its scores and values are "
        f"not normalised (mean 0, std 1); add both if the model was released with them"
        for role, source in sources.items()
        if role in SCALAR_ROLES and source.kind == "hugging_face" and not source.has_scale()
    ]


def stage_hf_files(source: WeightSource, run_dir: Path, role: str, topology: Topology) -> Path:
    """Copies config.json and tokenizer of a role into the run folder; all ranks must call it.

    A run that has a checkpoint keeps its copy; files of an attempt that left none are replaced.
    """
    folder = run_dir / "model_files" / role
    if topology.is_lead and not (folder.is_dir() and latest_checkpoint(run_dir)):
        partial = folder.with_name(f".partial_{role}")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source.hf_folder, partial, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin"))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    topology.barrier()
    return folder


def write_scale(folder: Path, mean: float, std: float) -> None:
    """Keeps a reward model's mean and std in its config.json, under OpenRLHF's names."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(mean=mean, std=std)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(config, indent=2))
    partial.replace(path)
