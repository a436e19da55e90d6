"""A run goes on with the data and the date it began with, or says that they are others."""

import json
import shutil
from pathlib import Path

import pytest
from ranks import run_ranks
from trainer.tiny_runs import configure, train

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
