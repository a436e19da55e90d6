"""A run goes on with the data and the date it began with, or says that they are others."""

import json
import os
import shutil
from pathlib import Path

import pytest
from engine.layouts import LAYOUTS
from ranks import run_ranks
from trainer.tiny_runs import WORDS, configure, train, write_rows

from rto_megatron.data import workers
from rto_megatron.reporting.metrics import read_metrics

DATED = "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|{{ m.role }}|> {{ m.content }}"
DATED += "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
DATED += "{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.mark.parametrize("stage", ["sft", "dpo", "rto"])
def test_other_data_are_refused_on_resume(stage: str, files: Path, tmp_path: Path) -> None:
    source = {"sft": "sft.jsonl", "dpo": "pairs.jsonl", "rto": "prompts.jsonl"}[stage]
    data = Path(shutil.copy(files / source, tmp_path / source))
    keys = {"data__train": str(data), "run__save_every": 1}
    run_dir = tmp_path / "run"
    assert run_ranks(1, train, configure(stage, files, run_dir, run__steps=1, **keys)) == [None]
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join([lines[1], lines[0], *lines[2:]]))
    (refusal,) = run_ranks(1, train, configure(stage, files, run_dir, run__steps=2, **keys))
    assert refusal is not None and refusal.startswith(
        "data.train: the checkpoint was made with other data: 20 items"
    )
    data.write_text("".join(lines))
    assert run_ranks(1, train, configure(stage, files, run_dir, run__steps=2, **keys)) == [None]


def test_the_date_of_the_first_start_is_given_again(files: Path, tmp_path: Path) -> None:
    policy, run_dir = tmp_path / "policy", tmp_path / "run"
    shutil.copytree(files / "models/policy", policy)
    config_file = policy / "tokenizer_config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "chat_template": DATED}))
    (policy / "chat_template.jinja").unlink(missing_ok=True)

    def run(steps: int) -> str | None:
        keys = {"models__policy": policy, "run__save_every": 1, "run__steps": steps}
        one, other = run_ranks(2, train, configure("sft", files, run_dir, "dp2", **keys))
        assert one == other
        return one

    assert run(1) is None
    date = (run_dir / "template_date").read_text()
    assert run(2) is None
    assert (run_dir / "template_date").read_text() == date
    (run_dir / "template_date").write_text("2001-02-03T04:05:06\n")
    assert "the checkpoint was made with other data" in str(run(3))
    (run_dir / "template_date").write_text("yesterday\n")
    assert "holds 'yesterday', expected the moment of the run's start" in str(run(3))


def test_a_mixture_of_conversations_trains_alike_on_any_ranks_and_goes_on(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        workers, "_WORTHWHILE", 500
    )  # bytes: ranks share the work with processes of their own
    talks, tasks = tmp_path / "talks.jsonl", tmp_path / "tasks.csv"
    turns = [
        [_said("user", n), _said("assistant", n + 1), _said("user", n), _said("assistant", n)]
        for n in range(8)
    ]
    write_rows(talks, [{"messages": talk} for talk in turns])
    tasks.write_text(
        "instruction,output\n" + "".join(f"{WORDS[n]} fox,{WORDS[n + 1]} dog\n" for n in range(4))
    )
    mixture = [str(talks), {"source": str(tasks), "weight": 2}]

    def run(layout: str, steps: int, name: str) -> list[float]:
        keys = {"data__train": mixture, "data__loss_on": "all", "run__save_every": 1, "run__steps": steps}
        assert not any(
            run_ranks(LAYOUTS[layout][0], train, configure("sft", files, tmp_path / name, layout, **keys))
        )
        return [line["loss"] for line in read_metrics(tmp_path / name)]

    whole = run("one", 5, "one")  # a pass has four steps
    assert run("dp2", 5, "two") == pytest.approx(whole, rel=1e-5)
    assert len(run("dp2", 6, "one")) == 6
    (entry,) = (tmp_path / "data_cache").glob("*/")
    assert len([*entry.glob("shard_*")]) == min(len(os.sched_getaffinity(0)), 2)


def _said(role: str, number: int) -> dict[str, str]:
    return {"role": role, "content": f"{WORDS[number % len(WORDS)]} {WORDS[(number * 5 + 1) % len(WORDS)]}"}
