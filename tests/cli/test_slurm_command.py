"""`rto slurm`: the script that it writes, and the jobs that it refuses."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.config.load import load_recipe
from rto_megatron.errors import MachineError, RecipeError
from rto_megatron.launching.attempts import Next
from rto_megatron.launching.slurm_job import ROOT, Allocation, Job, plan_job

RECIPES = ROOT / "launchers" / "recipes" / "llama3_8b"
SCRIPTS = ROOT / "launchers" / "slurm"
EIGHT = Allocation(nodes=4, pool_nodes=2, gpus_per_node=8)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What the pool needs of a policy with the name of a known shape."""
    folder = tmp_path / "Llama-3-8b"
    folder.mkdir()
    config = {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plan(
    stage: str,
    allocation: Allocation,
    *keys: str,
    tensor: int = 1,
    gib: float | None = None,
    model: Path | None = None,
) -> Job:
    policy = [] if model is None else [f"models.policy={model}"]
    return plan_job(load_recipe(RECIPES / f"{stage}.yaml", [*policy, *keys]), allocation, tensor, 3, [], gib)


def settings(script: Path) -> list[str]:
    """Names of the variables that a script sets before its body."""
    return re.findall(r"^(\w+)=", script.read_text().split("# The body")[0], re.MULTILINE)


def test_the_readable_scripts_set_what_the_written_one_sets(tmp_path: Path) -> None:
    written = plan("sft", Allocation(2, gpus_per_node=8), f"vars.root={tmp_path}").write()
    assert settings(written) == settings(SCRIPTS / "rto.sbatch") == settings(SCRIPTS / "offline.sbatch")


def test_a_written_script_is_whole_and_its_recipe_is_the_resolved_one(tmp_path: Path) -> None:
    root = tmp_path / "a run's folder"  # quoting
    run = root / "sft"
    job = plan(
        "sft",
        Allocation(2, 0, 8, "ib0", "1:00:00", 600, "long", "me"),
        f"vars.root={root}",
        "optimizer.lr=1e-6",
    )
    text = job.write().read_text()
    options = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    expected = [
        "nodes=2",
        "gpus-per-node=8",
        "time=1:00:00",
        "partition=long",
        "account=me",
        "signal=B:USR1@600",
    ]
    assert {*expected, "requeue", "open-mode=append", "exclusive"} <= set(options)
    assert (SCRIPTS / "job.sh").read_text() in text
    shown = 'echo "$run_dir|$recipe|${#pool_options[@]}|${step_options[*]}|$ranks_per_node"'
    read = subprocess.run(
        ["bash", "-c", text.split("# The body")[0] + shown], capture_output=True, text=True, check=True
    )
    assert read.stdout.strip() == f"{run}|{run}/slurm/recipe.yaml|0|--gpus-per-node=8|8"
    assert load_recipe(run / "slurm" / "recipe.yaml") == job.config
    assert run.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("script", ["job.sh", "rto.sbatch", "offline.sbatch", "test_cluster.sh"])
def test_scripts_are_bash(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=False).returncode == 0


def test_the_script_obeys_every_word_of_a_decision_and_reads_no_json() -> None:
    text = (SCRIPTS / "job.sh").read_text()
    assert set(re.findall(r"^    ([A-Z]+)\) .*;;$", text, re.MULTILINE)) == set(Next)
    assert not re.search(r"\b(sed|jq|python)\b|checkpoints", text)


def test_servers_fill_the_nodes_of_the_pool(tmp_path: Path, model: Path) -> None:
    for tensor, nodes_each, servers in ((1, 1, 16), (4, 1, 4), (8, 1, 2), (16, 2, 1)):
        job = plan("rto", EIGHT, f"vars.root={tmp_path}", tensor=tensor, model=model)
        assert (job.ranks_per_node, job.server_nodes, job.num_servers) == (8, nodes_each, servers)
        given = dict(zip(job.pool_options[1::2], job.pool_options[2::2], strict=True))
        on_each = str(max(1, 8 // tensor))
        assert given == {
            "--dtype": "bf16", "--max-model-len": "2048", "--servers": on_each, "--tensor-parallel": str(tensor)
        }  # fmt: skip
    assert "token" not in " ".join(job.write().read_text().split("# The body")[0].split("=")[1:])


def test_ranks_of_a_job_without_gpus_are_those_of_the_layout(tmp_path: Path) -> None:
    job = plan("sft", Allocation(2), f"vars.root={tmp_path}", "parallel.tensor=4")
    assert job.ranks_per_node == 2 and "#SBATCH --gpus-per-node" not in job.write().read_text()


def test_a_job_without_gpus_has_ranks_for_every_role(tmp_path: Path) -> None:
    keys = ("parallel.tensor=2", "parallel.roles.reference.tensor=4")
    assert plan("dpo", Allocation(2), f"vars.root={tmp_path}", *keys).ranks_per_node == 2
    own = ("parallel.tensor=2", "parallel.roles.reference.ranks=2-3")
    assert plan("dpo", Allocation(2), f"vars.root={tmp_path}", *own).ranks_per_node == 2


def test_ranks_of_a_role_s_own_count_in_the_memory_of_those_alone(tmp_path: Path, model: Path) -> None:
    """The policy's 8 ranks: 2.0e9 parameters at 12 bytes and twice 2, 29.9 GiB, and activations; no critic beside."""
    own = ("parallel.roles.critic={tensor: 4, ranks: 8-15}", "parallel.roles.reward={tensor: 4, ranks: 8-15}")
    keys = (f"vars.root={tmp_path}", "parallel.distributed_optimizer=true", *own)
    plan("rto", EIGHT, *keys, gib=35, model=model)
    with pytest.raises(RecipeError, match=r"the trainer takes 3\d\.\d GiB of a GPU's 29\.0 GiB"):
        plan("rto", EIGHT, *keys, gib=29, model=model)


def test_a_container_sees_the_checkout_and_the_run(tmp_path: Path) -> None:
    asked = Allocation(2, gpus_per_node=8, container="img.sqsh", mounts=("/data",))
    (options,) = re.findall(
        r"^step_options=.*", plan("sft", asked, f"vars.root={tmp_path}").write().read_text(), re.M
    )
    assert f"--container-mounts={ROOT}:{ROOT},{tmp_path}/sft:{tmp_path}/sft,/data:/data" in options
    assert "--container-image=img.sqsh" in options and "--no-container-mount-home" in options


@pytest.mark.parametrize(
    ("stage", "allocation", "keys", "tensor", "part"),
    [
        (
            "rto",
            Allocation(4, 0, 8),
            (),
            1,
            "samples from an inference pool; give it nodes with --pool-nodes",
        ),
        ("rto", Allocation(2, 2, 8), (), 1, "leaves no node for the trainer"),
        ("sft", Allocation(4, 2, 8), (), 1, "stage sft needs no pool"),
        ("rto", EIGHT, ("rollout.servers=[http://a:1]",), 1, "names a pool that runs already"),
        ("rto", EIGHT, ("rollout.colocated=true",), 1, "gives the pool nodes of its own"),
        ("rto", EIGHT, (), 3, "--pool-tensor 3 does not fit nodes of 8 GPUs"),
        ("rto", Allocation(4, 3, 8), (), 16, "takes 2 nodes of 8 GPUs for each server, and --pool-nodes 3"),
        ("rto", Allocation(12, 8, 8), (), 64, "does not divide the policy's 32 attention heads"),
        ("sft", Allocation(3, 0, 8), ("parallel.tensor=16",), 1, "does not divide the 24 ranks"),
        ("rto", EIGHT, ("parallel.roles.critic.tensor=3",), 1, "3 x 1 = 3 does not divide the 16 ranks"),
        (
            "rto",
            EIGHT,
            ("parallel.roles.critic.ranks=12-16",),
            1,
            "names rank 16 of a job of 16 ranks, 0 to 15",
        ),
    ],
)
def test_what_cannot_work_is_refused(
    model: Path, stage: str, allocation: Allocation, keys: tuple[str, ...], tensor: int, part: str
) -> None:
    with pytest.raises(RecipeError, match=re.escape(part)):
        plan(stage, allocation, *keys, tensor=tensor, model=model)


def test_models_that_do_not_fit_are_refused(tmp_path: Path, model: Path) -> None:
    plan("rto", EIGHT, f"vars.root={tmp_path}", gib=80, model=model)
    # 8.03e9 parameters x 2 bytes = 15.0 GiB of weights on the pool's GPU.
    with pytest.raises(
        RecipeError, match=r"the pool's weights take 15\.0 GiB of a GPU's 10\.0 GiB; raise --pool-tensor"
    ):
        plan("rto", EIGHT, f"vars.root={tmp_path}", gib=10, model=model)
    with pytest.raises(RecipeError, match=r"the trainer takes \d+\.\d GiB of a GPU's 10\.0 GiB"):
        plan("rto", EIGHT, f"vars.root={tmp_path}", gib=10, tensor=8, model=model)


def test_submitting_without_slurm_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    command = [
        "slurm",
        str(RECIPES / "sft.yaml"),
        "--nodes",
        "1",
        "--gpus-per-node",
        "8",
        f"vars.root={tmp_path}",
    ]
    with pytest.raises(MachineError, match="no sbatch on this machine"):
        CliRunner().invoke(app, [*command, "--submit"], catch_exceptions=False)
