"""Loggers keep the numbers, texts and settings that they are given; each is tried with its own package."""

import json
import struct
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rto_megatron.config.training import TrainRunConfig
from rto_megatron.reporting.loggers import LoggedRun, SampleText, missing_loggers, settings_of
from rto_megatron.reporting.metrics import MetricLog

HOSTILE = "</pre><script>alert(1)</script>"
TEXTS = [SampleText("2 + 2 =", HOSTILE, {"score": 0.5, "reward": 0.25})]
SETTINGS = {"optimizer.lr": 1e-3, "stage": "rto"}


def _log(run_dir: Path, *names: str) -> None:
    loggers = TrainRunConfig(dir=run_dir, loggers=names).loggers
    with MetricLog(run_dir, 0, loggers, SETTINGS) as log:
        log.write(1, {"reward/score": 0.5, "loss": 2.0})
        log.write(2, {"reward/score": 0.75, "loss": float("nan")})
        log.samples(2, TEXTS)


def test_tensorboard_holds_scalars_escaped_texts_and_hyperparameters(tmp_path: Path) -> None:
    _log(tmp_path, "tensorboard")
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in board.Scalars("reward/score")] == [(1, 0.5), (2, 0.75)]
    text = board.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "2 + 2 =" in text and "score +0.500, reward +0.250" in text and "<script" not in text
    hyper = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"optimizer.lr" in hyper and b"rto" in hyper


def test_no_logger_leaves_the_file_of_metrics(tmp_path: Path) -> None:
    _log(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb: requirements/loggers.txt")
def test_wandb_holds_scalars_texts_and_settings_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    _log(tmp_path, "wandb")
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    # W&B's own process writes the file, and may be a little behind.
    until = time.monotonic() + 30
    while b"optimizer.lr" not in (written := file.read_bytes()) and time.monotonic() < until:
        time.sleep(0.1)
    for text in ("reward/score", "0.75", "optimizer.lr", "0.001"):
        assert text.encode() in written, text
    (table,) = tmp_path.rglob("samples*.table.json")
    assert json.loads(table.read_text())["data"] == [["2 + 2 =", HOSTILE, 0.5, 0.25]]
    name = (tmp_path / "wandb_id").read_text().strip()
    assert name in file.name and LoggedRun(tmp_path, 2, {}).id_of("wandb", "another") == name


@pytest.mark.skipif(find_spec("swanlab") is None, reason="needs swanlab: requirements/loggers.txt")
def test_swanlab_holds_scalars_texts_and_settings_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    _log(tmp_path, "swanlab")
    written = b"".join(path.read_bytes() for path in (tmp_path / "swanlab").rglob("*") if path.is_file())
    for text in (b"reward/score", b"optimizer.lr", struct.pack("<d", 0.75), HOSTILE.encode()):
        assert text in written, text


def test_a_logger_that_is_not_installed_is_named_with_the_way_to_it() -> None:
    absent = [name for name in ("wandb", "swanlab") if find_spec(name) is None]
    said = missing_loggers(["tensorboard", "wandb", "swanlab"])
    assert len(said) == len(absent)
    assert all(
        "requirements/loggers.txt" in text and name in text for text, name in zip(said, absent, strict=True)
    )


def test_settings_are_flat() -> None:
    tree = {"run": {"steps": 3, "loggers": ["wandb"]}, "stage": "rto"}
    assert settings_of(tree) == {"run.steps": 3, "run.loggers": "['wandb']", "stage": "rto"}
