"""`rto check` judges recipes on machines that have neither the GPUs nor the models."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.cli.main import app
from rto_megatron.config.load import load_recipe
from rto_megatron.config.plan import plan_stage
from rto_megatron.config.roles import Role, roles_of
from rto_megatron.errors import ModelFolderError, RecipeError
from rto_megatron.models.parameters import num_parameters
from rto_megatron.planning.activation_memory import activation_bytes
from rto_megatron.planning.memory import role_cost
from rto_megatron.planning.shapes import KNOWN_SHAPES, find_shape, hugging_face_folder

RECIPES = Path(__file__).parents[2] / "launchers" / "recipes"
FAMILIES = sorted((RECIPES / "families").glob("*.yaml"))
PAPER = sorted((RECIPES / "llama3_8b").glob("*.yaml"))


def check(*arguments: str) -> str:
    shown = CliRunner().invoke(app, ["check", *arguments], catch_exceptions=False)
    assert shown.exit_code == 0
    return shown.output


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("smollm3-3b", 3_075_098_624),
        ("olmo-2-7b", 7_298_617_344),
        ("granite-3.1-8b", 8_170_848_256),
        ("gemma-2-9b", 9_241_705_984),
        ("gemma-3-1b", 999_885_952),
        ("glm-4-9b", 9_400_279_040),
        ("seed-oss-36b", 36_151_104_512),
        ("phi-4", 14_659_507_200),
        ("phi-4-mini", 3_836_021_760),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, parameters: int) -> None:
    assert num_parameters(KNOWN_SHAPES[name], has_scalar_head=False) == parameters


@pytest.mark.parametrize("folder", ["llama3_8b", "quickstart"])
@pytest.mark.parametrize("method", ALGORITHMS)
def test_every_method_has_a_recipe_of_its_name(method: str, folder: str) -> None:
    assert load_recipe(RECIPES / folder / f"{method}.yaml").stage == method


@pytest.mark.parametrize("stage", ["dpo", "rto"])
def test_recipes_of_a_mixture_pass_on_32_gpus(stage: str) -> None:
    printed = check(str(RECIPES / "qwen3_30b_a3b" / f"{stage}.yaml"), "--gpus", "32")
    replicas = 16 if stage == "dpo" else 8  # half of the GPUs sample
    assert f"data {replicas // 2}; experts in 8 parts x 1 ranks, held {replicas // 8} times" in printed
    # Of 48 x 128 experts of 3 x 2048 x 768 a rank holds an eighth of half, of the rest a quarter.
    assert "2,197.2 M" in printed


@pytest.mark.parametrize("recipe", PAPER, ids=lambda path: path.stem)
def test_paper_recipes_pass_on_8_gpus(recipe: Path) -> None:
    pool = ["--pool-gpus", "2"] if recipe.stem == "rto_own_ranks" else []
    said = " ".join(check(str(recipe), "--gpus", "8", *pool).split())
    assert (
        "nothing speaks against its layout, batches and data on 8 GPUs; it is sound where memory is" in said
    )


def test_a_recipe_is_sound_for_a_named_gpu_that_has_room() -> None:
    recipe = str(RECIPES / "llama3_8b" / "rto.yaml")
    said = " ".join(check(recipe, "--gpus", "8", "--gpu", "h100").split())
    assert said.endswith("sound for 8 GPUs, h100 each.")
    with pytest.raises(RecipeError, match=r"more than the 39\.0 GiB that a 40:312:1555 has"):
        check(recipe, "--gpus", "8", "--gpu", "40:312:1555")


@pytest.mark.parametrize("recipe", FAMILIES, ids=lambda path: path.stem)
def test_recipes_of_other_families_pass_without_their_models(recipe: Path) -> None:
    gpus = "32" if "36b" in recipe.stem else "8"
    said = " ".join(check(str(recipe), "--gpus", gpus, "--gpu", "h100").split())
    assert said.endswith(f"sound for {gpus} GPUs, h100 each.")
    assert find_shape(load_recipe(recipe).models.policy, None) is not None


def test_layout_arithmetic_and_place_of_each_model_are_shown() -> None:
    output = check(str(RECIPES / "llama3_8b" / "rto.yaml"), "--gpus", "8")
    assert "4 = tensor 4 x pipeline 1 x data 1" in output
    assert (
        "128 sequences, shared by FLOPs over 1 data-parallel ranks, in micro-batches of 8192 tokens" in output
    )
    assert "8 optimizer steps per pass" in output
    assert "4 GPUs of its own" in output
    assert "shares reference" in output
    assert "8,030.3 M" in output
    by_number = check(str(RECIPES / "llama3_8b" / "rto.yaml"), "batch.micro=2", "--gpus", "8")
    assert "128 = 1 data-parallel ranks x 64 micro-batches x 2 sequences" in by_number


def test_the_layout_of_a_role_is_shown_and_counts_in_its_memory() -> None:
    """A critic of 1,235.8 M parameters, whole on each of 4 ranks: 6 + 12 / 4 bytes a parameter, 10.4 GiB."""
    output = check(str(RECIPES / "llama3_8b" / "rto_roles.yaml"), "--gpus", "8")
    assert "of them the critic's │ tensor 1 x pipeline 1 x data 4" in output
    (row,) = (line for line in output.splitlines() if "critic " in line and "trained" in line)
    assert "1,235.8 M │ 1,235.8 M │        10.4 GiB" in row


def test_context_ranks_share_tokens_and_the_optimizer() -> None:
    """2,007.6 M parameters on a rank: 6 + 12 / 2 bytes each, 22.4 GiB, though there is one replica."""
    recipe = str(RECIPES / "llama3_1_8b" / "rto_32k.yaml")
    output = check(recipe, "--gpus", "16")
    assert "8 = tensor 4 x context 2 x pipeline 1 x data 1" in output
    (row,) = (line for line in output.splitlines() if "policy " in line and "trained" in line)
    assert "2,007.6 M │        22.4 GiB" in row
    shape = find_shape(Path("Llama-3.1-8B"), None)
    assert shape is not None
    # Of a token, on 4 tensor ranks that share its states: what a layer reads, of which there are 32 and the embeddings;
    # inside one, norms and residual, q, k, v, what attention gives, and the feed-forward network; three gradients of
    # whole states and two of the network.
    entry, inside = 4096 // 4, (3 * 4096 + 3 * 40 * 128 + 4 * 14336) // 4 + 3 * 4096 + 2 * 14336 // 4
    columns = 128256 // 4

    def activations(context: int, scheme: str, recompute: bool = True) -> int:
        keys = [f"parallel.context={context}", f"parallel.context_scheme={scheme}"]
        plan = plan_stage(load_recipe(Path(recipe), [*keys, f"precision.recompute={recompute}"]), 16)
        return activation_bytes(plan, {"policy": shape})

    for context in (1, 2, 4):
        own = 32768 // context
        head = 6 * own * 4096 + 10 * 1024 * columns + 6 * columns * 4096
        want = 2 * own * entry * 33 + max(2 * own * inside, head)
        assert activations(context, "ulysses") == pytest.approx(want, rel=1e-4)
    # Keys and values of 32 layers, of 32,768 tokens and 8 heads of 128 on 4 tensor ranks, 2 bytes a number.
    gathered = activations(2, "gather", recompute=False) - activations(2, "ulysses", recompute=False)
    assert gathered == 32 * 2 * 2 * 32768 * 8 * 128 // 4


def test_interleaved_stages_are_shown_and_count_by_the_fullest() -> None:
    """Of 80 layers of 855.65 M parameters the middle stages have 21, on 8 ranks; the outer ones 19 and 1,050.67 M."""
    recipe = str(RECIPES / "llama3_70b" / "rto.yaml")
    output = check(recipe, "--gpus", "64")
    assert "32 = tensor 8 x pipeline 4 in 5 chunks x data 1" in output
    (row,) = (line for line in output.splitlines() if "policy " in line and "trained" in line)
    assert "layers 19 + 21" in row and "2,246.1 M │        37.7 GiB" in row
    assert "nothing speaks against its layout, batches and data on 64 GPUs" in " ".join(output.split())
    keys = [f"parallel.roles.{role}.pipeline=4" for role in ("critic", "reward")]
    keys += ["batch.tokens=null", "batch.micro=1", "batch.train=6", "batch.rollout=1026"]
    by_number = check(recipe, *keys, "--gpus", "64")
    # 6 micro-batches and 2 empty ones go through 5 chunks a stage: of 43 passes' time the last stage waits for 3.
    assert "idle for 7% of the time, 2 empty micro-batches filling up their number" in by_number


def test_ranks_of_their_own_are_shown_and_judged_apart() -> None:
    """A critic of 1,235.8 M parameters on two ranks of its own: 6 + 12 / 2 bytes a parameter, 13.8 GiB."""
    output = check(str(RECIPES / "llama3_8b" / "rto_own_ranks.yaml"), "--gpus", "8", "--pool-gpus", "2")
    assert "of them the policy's │ tensor 4 x pipeline 1 x data 1, ranks 0-3" in output
    assert "of them the critic's │ tensor 1 x pipeline 1 x data 2, ranks 4-5" in output
    cells = [
        (line.split("│")[1].strip(), float(line.split("│")[-2].split()[0]))
        for line in output.splitlines()
        if " GiB │" in line
    ]
    of_policy, of_critic = (size for name, size in cells if name == "activations")
    sizes = dict(cells)
    assert (sizes["critic"], sizes["reward"]) == (13.8, 2.3)
    models = 33.7 + 3.7 + 3.7  # policy, reference and DPO model
    assert sizes["sum of ranks 0-3"] == pytest.approx(models + of_policy, abs=0.3)
    assert sizes["sum of ranks 4-5"] == pytest.approx(13.8 + 2.3 + of_critic, abs=0.3)


def test_what_is_ahead_is_shown() -> None:
    output = check(str(RECIPES / "llama3_8b" / "rto_ahead.yaml"), "--gpus", "8", "rollout.ahead=2")
    assert "receives the policy's weights after every 2 steps" in output
    assert "up to 2 steps older than the weights that they train" in output


def test_how_numbers_come_about_is_shown_where_it_is_not_the_default() -> None:
    keys = ("precision.fp32_parts", "precision.fp8", "rollout.old_logprobs")
    plain, ahead, pool, dpo = (
        " ".join(check(str(RECIPES / "llama3_8b" / f"{name}.yaml"), "--gpus", "8", *given).split())
        for name, given in (
            ("dapo", ()),
            ("rto_ahead", ()),
            ("dapo", ("rollout.old_logprobs=pool", "sampling.min_response_tokens=0")),
            ("dpo", ("precision.fp32_parts=[head,residual]",)),
        )
    )
    assert not [key for key in keys if f"{key} │" in plain]
    assert "precision.fp32_parts │ head: in fp32, of all roles and of the pool" in ahead
    assert "rollout.old_logprobs │ the pool's, some 0.046 nats a token from the trainer's" in pool
    assert "precision.fp32_parts │ head and residual: in fp32, of all roles │" in dpo


def test_the_rates_of_both_optimizers_are_shown_and_no_warm_up_is_the_whole_run() -> None:
    """10 rollout steps of 8 updates; transformers' schedule at 0, at ceil(0.03 x 80) = 3 and at 79."""
    output = check(
        str(RECIPES / "llama3_8b" / "rto.yaml"), "--gpus", "8", "run.steps=10", "optimizer.lr=1e-6"
    )
    assert " ".join(output.split()).count("80 optimizer steps, 3 of warm-up") == 2
    assert "optimizer.lr" in output and "critic_optimizer.lr" in output
    assert "first 0, highest 1e-06, last 1e-07" in " ".join(output.split())
    sft = check(str(RECIPES / "quickstart" / "sft.yaml"), "run.steps=1", "optimizer.lr=1e-3")
    assert "first 0.001, highest 0.001, last 0.001; 1 optimizer steps, 0 of warm-up" in " ".join(sft.split())


def test_a_stage_on_pairs_says_whether_prompts_are_computed_once() -> None:
    recipe = str(RECIPES / "quickstart" / "dpo.yaml")
    once, again = check(recipe), check(recipe, "batch.share_prompts=false")
    assert "a prompt" in once and "computed once for all its responses in a micro-batch" in once
    assert "computed again for each response: batch.share_prompts=false" in again


def test_memory_of_a_trained_model_is_18_bytes_a_parameter_and_of_a_frozen_one_2() -> None:
    one, four = (plan_stage(load_recipe(RECIPES / "llama3_8b" / "rto.yaml"), ranks) for ranks in (4, 16))
    assert (one.layout_of("policy").data, four.layout_of("policy").data) == (1, 4)
    shape = KNOWN_SHAPES["llama-3-8b"]
    trained = role_cost(Role("policy", Path("x"), True, False, None), shape, one)
    assert trained.bytes_per_rank == 18 * trained.parameters_per_rank
    sharded = role_cost(Role("policy", Path("x"), True, False, None), shape, four)
    assert sharded.bytes_per_rank == 9 * sharded.parameters_per_rank  # 6 + 12 / 4
    frozen = role_cost(Role("reference", Path("x"), False, False, None), shape, four)
    assert frozen.bytes_per_rank == 2 * frozen.parameters_per_rank
    assert frozen.parameters_per_rank == pytest.approx(shape_parameters() / 4, rel=1e-6)


def shape_parameters() -> int:
    return num_parameters(KNOWN_SHAPES["llama-3-8b"], has_scalar_head=False)


def test_recomputation_lowers_the_estimate_of_activations() -> None:
    shapes = {"policy": find_shape(Path("Llama-3-8b"), None)}
    known = {name: found for name, found in shapes.items() if found is not None}
    with_it, without = (
        activation_bytes(
            plan_stage(load_recipe(RECIPES / "llama3_8b" / "sft.yaml", [f"precision.recompute={flag}"]), 8),
            known,
        )
        for flag in ("true", "false")
    )
    assert 0 < with_it < without


def test_activations_of_a_budget_are_those_of_a_full_micro_batch_or_of_the_longest_pair() -> None:
    shape = find_shape(Path("Llama-3-8b"), None)
    assert shape is not None

    def activations(*overrides: str) -> int:
        config = load_recipe(RECIPES / "llama3_8b" / "dpo.yaml", overrides)
        return activation_bytes(plan_stage(config, 8), {"policy": shape})

    # data.max_length=2048, so a pair has up to 4096 tokens.
    assert activations("batch.tokens=8192") == activations("batch.micro=2")
    assert activations("batch.tokens=1000") == activations("batch.micro=1")


def test_rto_with_its_own_dpo_reference_holds_one_more_model() -> None:
    shared = roles_of(load_recipe(RECIPES / "llama3_8b" / "rto.yaml"))
    own = roles_of(load_recipe(RECIPES / "llama3_8b" / "rto.yaml", ["models.dpo_reference=other/model"]))
    assert [role.shares for role in shared if role.name == "dpo_reference"] == ["reference"]
    assert [role.shares for role in own if role.name == "dpo_reference"] == [None]


def test_heads_layers_and_lengths_are_checked_against_the_shapes() -> None:
    overrides = ["parallel.tensor=12", "parallel.pipeline=5", "data.max_prompt_tokens=9000"]
    with pytest.raises(RecipeError) as caught:
        check(str(RECIPES / "llama3_8b" / "rto.yaml"), *overrides, "--gpus", "120", "--pool-gpus", "60")
    message = str(caught.value)
    assert "parallel.tensor=12 does not divide num_key_value_heads=8" in message
    assert "parallel.pipeline=5 does not divide num_hidden_layers=32" in message
    assert "10024 tokens, but models.policy reads at most 8192" in message


def write_config(folder: Path, layers: int) -> None:
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))


def test_checkpoints_and_unfinished_runs_are_models_too(tmp_path: Path) -> None:
    for step, layers in ((100, 1), (200, 2)):
        checkpoint = tmp_path / "checkpoints" / f"step_{step:06d}"
        for role, num_layers in (("policy", layers), ("critic", layers + 4)):
            write_config(checkpoint / role / "hf", num_layers)
            (checkpoint / role / "weights").mkdir()
    for folder, step, layers in (
        (tmp_path, 200, 2),  # the run: its last checkpoint
        (tmp_path / "checkpoints" / "step_000100", 100, 1),
    ):
        expected = tmp_path / "checkpoints" / f"step_{step:06d}" / "policy" / "hf"
        assert hugging_face_folder(folder) == expected
        language, scalar = (find_shape(folder, None, role) for role in ("dpo", "critic"))
        assert language is not None
        assert scalar is not None
        assert (language.shape.num_layers, scalar.shape.num_layers) == (layers, layers + 4)
    with pytest.raises(ModelFolderError, match="no checkpoint of a policy; run the stage"):
        hugging_face_folder(tmp_path / "checkpoints")


def test_evaluation_is_checked_without_what_it_does_not_have() -> None:
    output = check(str(RECIPES / "quickstart" / "evaluate.yaml"))
    assert "one server on the CPU" in output
    assert "optimizer step" not in output


def test_shape_comes_from_config_json_before_any_assumption(tmp_path: Path) -> None:
    write_config(tmp_path / "hf", layers=2)
    found = find_shape(tmp_path, "llama-3-8b")
    assert found is not None
    assert (found.shape.num_layers, found.source) == (2, "config.json")
    assumed = find_shape(Path("some/model"), "llama-3.2-1b")
    assert assumed is not None
    assert assumed.shape == KNOWN_SHAPES["llama-3.2-1b"]
    assert find_shape(Path("some/model"), None) is None
    with pytest.raises(RecipeError, match="--assume llama-9: no such embedded shape"):
        find_shape(tmp_path, "llama-9")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--gpus", "1"], "leaves 1 for the trainer and 0 for the pool"),
        (["--gpus", "8", "--pool-gpus", "8"], "leaves 0 for the trainer"),
        (
            ["--gpus", "5", "--pool-gpus", "2"],
            r"4 x 1 = 4 does not divide the 3 ranks \(of 5 GPUs the pool has 2\)",
        ),
        (["--gpus", "8", "--assume", "policy"], "is written ROLE=SHAPE"),
        (["--gpus", "8", "--assume", "actor=llama-3-8b"], "this stage has the roles policy, critic"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], part: str) -> None:
    with pytest.raises(RecipeError, match=part):
        check(str(RECIPES / "llama3_8b" / "rto.yaml"), *arguments)


def test_a_stage_without_a_pool_gives_it_no_gpus() -> None:
    recipe = str(RECIPES / "llama3_8b" / "dpo.yaml")
    with pytest.raises(RecipeError, match="--pool-gpus 4 has no effect: stage dpo has no inference pool"):
        check(recipe, "--gpus", "8", "--pool-gpus", "4")
    assert "data 2" in check(recipe, "--gpus", "8", "--pool-gpus", "0")


@pytest.mark.parametrize(
    ("model", "words"),
    [("runs/quickstart/sft", "run the stage that makes it first"), ("acme/llama", "hf download acme/llama")],
)
def test_only_a_name_that_the_hub_could_have_is_offered_for_download(model: str, words: str) -> None:
    with pytest.raises(ModelFolderError, match=words) as caught:
        hugging_face_folder(Path(model))
    assert ("hf download" in str(caught.value)) == (model == "acme/llama")
