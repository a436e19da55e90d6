"""What every stage does before its first step: sources, layout checks, tokenizer, optimizer steps."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OfflineMethod
from rto_megatron.config import checks, schema
from rto_megatron.config.facts import facts_of
from rto_megatron.config.prompts_once import has_shared_prompts, why_prompts_repeat
from rto_megatron.config.roles import roles_of
from rto_megatron.config.run_folder import make_run_folder, open_folder_warning
from rto_megatron.data.budget import over_budget
from rto_megatron.data.cut import Layout
from rto_megatron.data.eos import read_eos
from rto_megatron.data.grouping import read_lengths
from rto_megatron.data.limits import limits_of
from rto_megatron.data.load_report import Loaded
from rto_megatron.data.prepared import PreparedData
from rto_megatron.data.score_place import read_elsewhere
from rto_megatron.data.tokenizer import encoding_fingerprint, load_plain_tokenizer, load_tokenizer
from rto_megatron.engine.source import WeightSource, find_sources
from rto_megatron.errors import MachineError
from rto_megatron.lifecycle.start_up import begin_part
from rto_megatron.models.layout_checks import (
    check_experts,
    check_fp8,
    check_kernels,
    check_layout,
    idle_expert_keys,
)
from rto_megatron.models.model_flops import forward_flops
from rto_megatron.models.shape import ModelShape
from rto_megatron.parallel.topology import Topology
from rto_megatron.planning.shapes import unread_weights
from rto_megatron.planning.token_ids import embedding_problems, require_embedded, spare_token_warnings
from rto_megatron.platform.whole_files import write_whole
from rto_megatron.reporting.loggers import missing_loggers
from rto_megatron.reporting.progress import say
from rto_megatron.storage.checkpoints import LANGUAGE_ROLES, SCALAR_ROLES, latest_checkpoint
from rto_megatron.storage.megatron_folder import REPORT
from rto_megatron.storage.weight_files import find_weights
from rto_megatron.trainer.model_files import note_eos
from rto_megatron.trainer.run_moment import run_moment
from rto_megatron.types import EndOfSequence, Example, PreferencePair, Rollout

# In the config.json of a model that was trained against a reference.
REFERENCE_FINGERPRINT = "reference_fingerprint"
_CACHE = "data_cache"


@dataclass(frozen=True)
class Setup:
    """A stage's surroundings, checked.

    Example:
        setup.admit(loaded)
    """

    topology: Topology
    sources: dict[str, WeightSource]  # role -> where its weights are
    tokenizer: PreTrainedTokenizerBase
    eos: EndOfSequence  # of the policy
    layout: Layout
    prepared: PreparedData
    # FLOPs of a forward of all models, by which replicas share batches; None: they take as many items each.
    cost: Callable[[Example | Rollout], float] | None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special ones included."""
        return str(self.tokenizer.decode(list(ids)))

    def admit(self, loaded: Loaded[Example]) -> None:
        """Says what was loaded, and refuses ids that no row of an embedding stands for.

        Raises:
            UserError: on every rank; names the tokens and where they come from, or the budget that is too small.
        """
        say(loaded.report.summary(), self.topology.is_lead)
        require_embedded(loaded, self.tokenizer, self.sources)
        warning = over_budget(loaded.items, loaded.report.source, self.layout)
        say(f"warning: {warning}", self.topology.is_lead and warning is not None)


def prepare_stage(config: schema.Stage, topology: Topology) -> Setup:
    """Finds every role's weights and checks them against the layout and against each other.

    Raises:
        UserError: all problems at once.
    """
    begin_part("checks")
    sources = find_sources(config)
    checks.refuse(setup_problems(config, sources, topology.world_size))
    _settle_kernels(config, topology)
    policy = sources["policy"]
    tokenizer = load_tokenizer(policy.hf_folder)
    eos, odd_ids = read_eos(policy.hf_folder, tokenizer, policy.shape().vocab_size)
    is_open = open_folder_warning(config.run.dir)
    warnings = [*spare_token_warnings(tokenizer, sources), *unread_weights(config.models)]
    spare = [f"warning: {text}" for text in warnings]
    left_open = [is_open] if is_open else []
    unlike = [*_missing_scales(sources), *_scores_elsewhere(sources)]
    for warning in [*_unread_weights(sources), *unlike, *spare, *odd_ids, *left_open]:
        say(warning, topology.is_lead)
    if topology.is_lead:
        make_run_folder(config.run.dir)
    moment = run_moment(config, tokenizer, topology)
    batch, device = config.batch, topology.device.torch_device
    why = why_prompts_repeat(config, topology.device.kernels)
    say(_prompts_told(why), topology.is_lead and has_shared_prompts(config))
    layout = Layout(batch.micro, batch.packed, topology.row_multiple, device, batch.tokens, why is None)
    cost = None if batch.tokens is None else _cost(config, sources, layout.shares_prompts)
    prepared = PreparedData(_cache(config), tokenizer, limits_of(config, moment), eos)
    return Setup(topology, sources, tokenizer, eos, layout, prepared, cost)


def _prompts_told(why: str | None) -> str:
    if why is None:
        return "a prompt is computed once for all its responses in a micro-batch"
    return f"a prompt is computed again for each of its responses: {why}"


def _settle_kernels(config: schema.Stage, topology: Topology) -> None:
    """Says what `auto` came to, which must be the same on all ranks; all must call it.

    Raises:
        MachineError: on every rank.
    """
    if config.precision.kernels != "auto":
        return
    has_torch = topology.any(topology.device.kernels == "torch")
    if has_torch and topology.any(topology.device.kernels != "torch"):
        raise MachineError(
            "precision.kernels=auto: TransformerEngine is installed for some ranks and not for others, whose layers "
            "would round differently; install it on every machine (bash launchers/install_gpu.sh), or set "
            "precision.kernels=torch"
        )
    say(f"precision.kernels=auto: layers are computed with {topology.device.kernels}", topology.is_lead)


def _cache(config: schema.Stage) -> Path:
    """Where tokenized data lie; in the run folder where the one beside it belongs to another user."""
    beside = config.run.dir.parent / _CACHE
    is_own = os.access(beside if beside.exists() else beside.parent, os.W_OK | os.X_OK)
    return config.data.cache or (beside if is_own else config.run.dir / _CACHE)


def _cost(
    config: schema.Stage, sources: Mapping[str, WeightSource], shares_prompts: bool
) -> Callable[[Example | Rollout], float]:
    models = [
        (sources[role.name].shape(), role.has_value_head) for role in roles_of(config) if role.shares is None
    ]

    def cost(example: Example | Rollout) -> float:
        lengths = read_lengths(example)
        repeated: tuple[int, ...] = ()
        if shares_prompts and isinstance(example, PreferencePair):
            repeated = (len(example.prompt_ids),)
        return sum(
            forward_flops(shape, is_scalar, lengths) - forward_flops(shape, is_scalar, repeated)
            for shape, is_scalar in models
        )

    return cost


def setup_problems(config: schema.Stage, sources: Mapping[str, WeightSource], world_size: int) -> list[str]:
    """Says why the models do not fit the layout, the batches or each other, one sentence each.

    Args:
        sources: role -> source, of every model that the stage loads.
        world_size: all ranks.
    """
    shapes = {role: source.shape() for role, source in sources.items()}
    parallel = config.parallel
    max_positions = {role: shape.max_positions for role, shape in shapes.items()}
    return [
        *(
            problem
            for role, shape in shapes.items()
            for problem in check_layout(
                shape, parallel.grid_of(role), f"models.{role}", parallel.key_of(role)
            )
        ),
        *idle_expert_keys(shapes, parallel),
        *check_kernels(shapes, config.precision.kernels),
        *check_fp8(shapes, config.precision, parallel),
        *check_experts(
            {role.name: shapes[role.name] for role in roles_of(config) if role.is_trained},
            parallel,
            config.models.moe_aux_loss_coef,
        ),
        *_unlike_vocabularies(config, shapes),
        *_unlike_tokenizers(sources),
        *embedding_problems(config, sources),
        *checks.find_problems(config, world_size, max_positions),
        *_missing_loggers(config),
    ]


def _missing_loggers(config: schema.Stage) -> list[str]:
    training = facts_of(config).training
    return [] if training is None else missing_loggers(training.run.loggers)


def _unlike_vocabularies(config: schema.Stage, shapes: Mapping[str, ModelShape]) -> list[str]:
    """Whole distributions can only be compared where both models cut the vocabulary alike."""
    method = ALGORITHMS.get(config.stage)
    if not isinstance(method, OfflineMethod) or method.outputs != "divergence":
        return []
    sizes = {role: shapes[role].vocab_size for role in ("policy", "reference")}
    if sizes["policy"] == sizes["reference"]:
        return []
    return [
        f"models.reference has vocab_size={sizes['reference']} and models.policy {sizes['policy']}; stage "
        f"{config.stage} compares whole distributions: resize the embeddings of one"
    ]


def _unlike_tokenizers(sources: Mapping[str, WeightSource]) -> list[str]:
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


def _unread_weights(sources: dict[str, WeightSource]) -> list[str]:
    notes = {
        role: find_weights(source.path).note()
        for role, source in sources.items()
        if source.kind == "hugging_face"
    }
    return [
        f"models.{role}: {sources[role].path}: {note}" for role, note in notes.items() if note is not None
    ]


def _missing_scales(sources: dict[str, WeightSource]) -> list[str]:
    return [
        f"warning: models.{role}: {source.hf_folder}/config.json has no mean and std, so its scores and values are "
        f"not normalised (mean 0, std 1); add both if the model was released with them"
        for role, source in sources.items()
        if role in SCALAR_ROLES and source.kind in ("hugging_face", "megatron") and not source.has_scale()
    ]


def _scores_elsewhere(sources: dict[str, WeightSource]) -> list[str]:
    source = sources.get("reward")
    # With mean and std it is one that this program trained, or one like it.
    if source is None or source.kind == "checkpoint" or source.has_scale():
        return []
    folder = source.hf_folder
    if (where := read_elsewhere(folder, load_plain_tokenizer(folder))) is None:
        return []
    return [
        f"warning: models.reward: transformers reads the scores of {folder} {where}; here they are read at that token, "
        "and differ from those of a model that was trained in transformers on such texts"
    ]


def stage_hf_files(
    source: WeightSource, run_dir: Path, role: str, topology: Topology, eos: EndOfSequence
) -> Path:
    """Copies config.json and tokenizer of a role into the run folder; all ranks must call it.

    A run that has a checkpoint keeps its copy; files of an attempt that left none are replaced.

    Args:
        eos: of the policy, which the copy of a language model names.
    """
    folder = run_dir / "model_files" / role
    if topology.is_lead and not (folder.is_dir() and latest_checkpoint(run_dir)):
        partial = folder.with_name(f".partial_{role}")
        shutil.rmtree(partial, ignore_errors=True)
        # The report of a conversion names tensors that training will change.
        others = shutil.ignore_patterns("*.safetensors*", "*.bin", REPORT)
        shutil.copytree(source.hf_folder, partial, ignore=others)
        # What a starting point was compared with says nothing about the model that is trained from it.
        note_in_config(partial, **{REFERENCE_FINGERPRINT: None})
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    if topology.is_lead and role in LANGUAGE_ROLES:
        note_eos(folder, eos)
    topology.barrier()
    return folder


def note_in_config(folder: Path, **entries: float | str | None) -> None:
    """Keeps facts about a model in its config.json, which checkpoints and exports carry; None takes one away."""
    path = folder / "config.json"
    before = json.loads(path.read_text())
    merged = {**before, **entries}
    config = {key: value for key, value in merged.items() if key not in entries or value is not None}
    if config != before:
        write_whole(path, json.dumps(config, indent=2))
