"""What `rto slurm` asks of SLURM: GPUs, features, shared nodes, containers, a preamble, and paths that need quotes."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.config.load import load_recipe
from rto_megatron.errors import RecipeError
from rto_megatron.launching.slurm_job import ROOT

SFT = ROOT / "launchers" / "recipes" / "llama3_8b" / "sft.yaml"
# Everything that bash, sbatch, YAML or a log's pattern reads as something else.
STRANGE = '50% #1, %j: it\'s [x] $HOME `id` "q"; &'


def recipe_in(root: Path, tmp_path: Path) -> Path:
    """A recipe whose run folder is `root`/sft."""
    tree = yaml.safe_load(SFT.read_text())
    tree["vars"]["root"] = str(root)
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    return recipe


def slurm(recipe: Path, *options: str) -> str:
    """The script that the command writes."""
    shown = CliRunner().invoke(app, ["slurm", str(recipe), "--nodes", "2", *options], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    return (load_recipe(recipe).run.dir / "slurm" / "job.sbatch").read_text()


def asked(script: str) -> list[str]:
    """Options of its #SBATCH lines."""
    return re.findall(r"^#SBATCH --(.*)$", script, re.MULTILINE)


def setting(script: str, name: str) -> list[str]:
    """What bash reads as the array `name` of a written script's settings."""
    settings = script.split("# The body", maxsplit=1)[0]
    show = f'for one in "${{{name}[@]}}"; do printf "%s\\0" "$one"; done'
    shown = subprocess.run(["bash", "-c", f"{settings}\n{show}"], capture_output=True, text=True, check=True)
    return shown.stdout.split("\0")[:-1]


@pytest.mark.parametrize(
    ("options", "gpus", "lines", "step"),
    [
        (["--gres", "gpu:4"], 4, ["gres=gpu:4"], ["--gres=gpu:4"]),
        (["--gres", "gpu"], 1, ["gres=gpu"], ["--gres=gpu"]),
        (["--gres", "gpu:h100:8"], 8, ["gres=gpu:h100:8"], ["--gres=gpu:h100:8"]),
        (["--gres", "gpu:1080ti:2,nvme:1,gpu:2"], 4, ["gres=gpu:1080ti:2,nvme:1,gpu:2"], None),
        (["--gres", "gpu:8", "--gpus-per-node", "8"], 8, ["gres=gpu:8"], ["--gres=gpu:8"]),
        (
            ["--gres", "nvme:1", "--gpus-per-node", "8"],
            8,
            ["gres=nvme:1", "gpus-per-node=8"],
            ["--gres=nvme:1", "--gpus-per-node=8"],
        ),
        (["--gpus-per-node", "8"], 8, ["gpus-per-node=8"], ["--gpus-per-node=8"]),
    ],
)
def test_gpus_are_asked_for_once_and_each_has_a_rank(
    tmp_path: Path, options: list[str], gpus: int, lines: list[str], step: list[str] | None
) -> None:
    script = slurm(recipe_in(tmp_path, tmp_path), *options, "parallel.tensor=1", "parallel.sequence=false")
    assert [line for line in asked(script) if line.startswith("g")] == lines
    assert setting(script, "ranks_per_node") == [str(gpus)]
    assert setting(script, "step_options") == (step or [f"--{lines[0]}"])


def test_gpus_of_a_gres_are_judged_against_the_layout(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"4 x 1 = 4 does not divide the 6 ranks \(2 nodes x 3 GPUs\)"):
        slurm(recipe_in(tmp_path, tmp_path), "--gres", "gpu:3", "parallel.tensor=4")


def test_the_site_gets_what_it_wants_to_know(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, tmp_path)
    script = slurm(
        recipe,
        "--gres",
        "gpu:8",
        "--qos",
        "long",
        "--constraint",
        "h100&[rack1|rack2]",
        "--time",
        "1-00:00:00",
    )
    assert {"qos=long", 'constraint="h100&[rack1|rack2]"', "time=1-00:00:00", "exclusive", "mem=0"} <= set(
        asked(script)
    )
    script = slurm(recipe, "--gres", "gpu:8", "--no-exclusive", "--cpus-per-task", "64")
    assert "cpus-per-task=64" in asked(script)
    assert not [line for line in asked(script) if line.startswith(("exclusive", "mem"))]
    assert "mem=500G" in asked(slurm(recipe, "--gres", "gpu:8", "--mem", "500G"))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            ["--gres", "gpu:4", "--gpus-per-node", "8"],
            ["--gres gpu:4 names 4 GPUs of a node, and --gpus-per-node 8; give one of the two"],
        ),
        (["--gres", "gpu:4", "--gpus-per-node", "0"], ["names 4 GPUs of a node, and --gpus-per-node 0"]),
        (["--gres", "gpu=2"], ["--gres gpu=2: GPUs of a node are written gpu:COUNT or gpu:TYPE:COUNT"]),
        (["--gres", "gres/gpu:2"], ["--gres gres/gpu:2: GPUs of a node are written gpu:COUNT"]),
        (["--gres", "gpu:h100:eight"], ["--gres gpu:h100:eight: GPUs of a node are written"]),
        (
            ["--no-exclusive"],
            ["SLURM would give the job one CPU of each node; ask for more with --cpus-per-task"],
        ),
        (["--cpus-per-task", "8"], ["--cpus-per-task 8 has no effect on exclusive nodes"]),
        (
            ["--container", "a.sqsh", "--apptainer", "a.sif", "--qos", "", "--mount", "/a:/b"],
            [
                "--container (pyxis) and --apptainer both name an image",
                "--qos: found an empty text",
                "--mount /a:/b: is no folder here; the container shows a folder under its own path",
            ],
        ),
        (
            ["--time", "5:00"],
            ["--time 5:00 --notice 300: SLURM would tell the job to save as soon as it starts"],
        ),
        (["--time", "6", "--notice", "300"], ["raise --time or lower --notice"]),
        (["--time", "1:00:00", "--notice", "3600"], ["raise --time or lower --notice"]),
        (["--time", "0-01", "--notice", "3600"], ["raise --time or lower --notice"]),
        (["--time", "1-00:30", "--notice", "88200"], ["raise --time or lower --notice"]),  # 24.5 h
        (
            ["--time", "abc"],
            ["--time abc: no limit that SLURM reads; expected minutes, hours:minutes:seconds"],
        ),
        (["--time", "24h"], ["--time 24h: no limit that SLURM reads"]),
        (["--mem", "500GG"], ["--mem 500GG: no size that SLURM reads; expected a number with K, M, G or T"]),
        (["--mem", "half"], ["--mem half: no size that SLURM reads"]),
        (
            ["--pool-tensor", "2", "--time", "24h"],
            ["--time 24h: no limit", "--pool-tensor 2 has no effect without --pool-nodes"],
        ),
        (["--mount", "/data"], ["--mount /data has no effect without a container"]),
        (["--partition", "a\n#SBATCH --uid=0"], ["--partition: found 'a\\n#SBATCH --uid=0'; a line break"]),
        (["--preamble", "/nowhere/modules.sh"], ["--preamble /nowhere/modules.sh: cannot be read"]),
    ],
)
def test_what_is_unknown_or_contradicts_itself_is_refused(
    tmp_path: Path, options: list[str], parts: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        slurm(recipe_in(tmp_path, tmp_path), *options)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert not (tmp_path / "sft").exists()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("module load cuda\nif true; then\n", "is no bash: "),
        (
            "module load cuda\n#SBATCH --qos=long\n",
            ":2: found '#SBATCH --qos=long', which has no effect there",
        ),
    ],
)
def test_a_preamble_that_cannot_do_what_it_says_is_refused(tmp_path: Path, text: str, part: str) -> None:
    preamble = tmp_path / "modules.sh"
    preamble.write_text(text)
    with pytest.raises(RecipeError, match=re.escape(part)):
        slurm(recipe_in(tmp_path, tmp_path), "--preamble", str(preamble))


def test_a_job_may_be_as_short_as_its_notice_allows(tmp_path: Path) -> None:
    for limit in ("6:01", "7", "0:06:01", "0-1", "0-0:7", "0-0:06:01", "0", "infinite", "UNLIMITED"):
        assert f"time={limit}" in asked(slurm(recipe_in(tmp_path, tmp_path), "--time", limit))


def test_paths_reach_sbatch_and_bash_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / STRANGE
    root.mkdir()
    recipe = recipe_in(root, tmp_path)
    monkeypatch.chdir(root)
    shown = CliRunner().invoke(app, ["slurm", str(recipe), "--nodes", "2"], catch_exceptions=False)
    run = root / "sft"
    assert shlex.split(shown.output.splitlines()[1])[-2:] == ["sbatch", str(run / "slurm" / "job.sbatch")]
    script = (run / "slurm" / "job.sbatch").read_text()
    escaped = '50% #1, %j: it\'s [x] $HOME `id` \\"q\\"; &'
    assert f'chdir="{tmp_path}/{escaped}"' in asked(script)
    assert f'output="{tmp_path}/{escaped.replace("%", "%%")}/sft/slurm/log-%j.txt"' in asked(script)
    assert setting(script, "run_dir") == [str(run)]
    assert setting(script, "recipe") == [str(run / "slurm" / "recipe.yaml")]
    assert load_recipe(run / "slurm" / "recipe.yaml") == load_recipe(recipe)


def test_a_run_folder_that_slurm_cannot_log_into_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"SLURM writes no log into a path with a backslash"):
        slurm(recipe_in(tmp_path / "a\\b", tmp_path))
    with pytest.raises(RecipeError, match=r"run\.dir: found .*; a line break"):
        slurm(recipe_in(tmp_path / "a\n#SBATCH --uid=0", tmp_path))


def test_apptainer_shows_folders_of_any_name(tmp_path: Path) -> None:
    data = tmp_path / 'a,b: "c"'
    data.mkdir()
    image = tmp_path / "our image.sif"
    image.touch()
    script = slurm(
        recipe_in(tmp_path, tmp_path), "--gres", "gpu:8", "--apptainer", str(image), "--mount", str(data)
    )
    run = tmp_path / "sft"
    clean = ["env", "-u", "APPTAINER_CLEANENV", "-u", "APPTAINER_CONTAINALL"]
    named = f'{tmp_path}/a,b: ""c""'
    assert setting(script, "container") == [
        *clean, "apptainer", "exec", "--nv",
        "--mount", f"type=bind,source={ROOT},destination={ROOT}",
        "--mount", f"type=bind,source={run},destination={run}",
        "--mount", f'type=bind,"source={named}","destination={named}"',
        str(image),
    ]  # fmt: skip
    assert "--nv" not in setting(slurm(recipe_in(tmp_path, tmp_path), "--apptainer", str(image)), "container")


def test_pyxis_refuses_folders_whose_names_it_would_split(tmp_path: Path) -> None:
    options = ["--gres", "gpu:8", "--container", "nvcr.io#nvidia/pytorch:25.01-py3"]
    for name in ("a b", "a,b"):
        (tmp_path / name).mkdir()
        with pytest.raises(
            RecipeError, match=re.escape(f"pyxis cannot show {tmp_path / name}, as a comma, colon or space")
        ):
            slurm(recipe_in(tmp_path, tmp_path), *options, "--mount", str(tmp_path / name))
    script = slurm(recipe_in(tmp_path, tmp_path), *options)
    assert "--container-image=nvcr.io#nvidia/pytorch:25.01-py3" in setting(script, "step_options")
    assert setting(script, "container") == []
