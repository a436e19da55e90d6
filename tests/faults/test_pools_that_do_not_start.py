"""`rto launch` with a pool that does not start, whose ranks have started: its error ends all, and nothing is left."""

from pathlib import Path

import pytest
from faults.launched import of_run, start

# In the place of vLLM: a server that waits for a rank, and fails.
WAITS_AND_FAILS = """
import os, pathlib, time
ranks = pathlib.Path(os.environ["AWAITED_RANKS"])
while not list(ranks.glob("attempt_1_rank_*.txt")):
    time.sleep(0.05)
raise RuntimeError("no server today")
"""


def test_a_pool_that_does_not_start_ends_the_ranks_beside_it(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, run_dir = tmp_path / "pretending" / "vllm" / "entrypoints", tmp_path / "run"
    for module in ("openai/api_server.py", "cli/main.py"):
        (package / module).parent.mkdir(parents=True)
        (package / module).write_text(WAITS_AND_FAILS)
        for folder in (package.parent, package, (package / module).parent):
            (folder / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "pretending"))
    monkeypatch.setenv("AWAITED_RANKS", str(run_dir / "stacks"))
    launch = start(files, run_dir, stage="reinforce_pp", ranks=1)
    said = launch.end()
    assert launch.process.returncode == 2, said
    told = f"the first error in {run_dir}/pool/server-0.log:\n  RuntimeError: no server today"
    assert said.count("error: ") == 1 and f"ended while starting; {told}" in said, said
    status = launch.status()
    assert (status["reason"], status["step"]) == ("CONFIG", 0) and str(status["message"]).endswith(told)
    assert of_run(files) == []  # a server names its model
    assert {path.name for path in (run_dir / "pool").iterdir()} == {"server-0.log", "token"}
    assert list((run_dir / "stacks").iterdir()) == []
