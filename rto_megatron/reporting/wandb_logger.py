"""Weights & Biases. Project, entity, mode and key are W&B's own variables: WANDB_PROJECT, WANDB_MODE=offline, ..."""

import secrets
from collections.abc import Mapping, Sequence

import wandb

from rto_megatron.reporting.loggers import LoggedRun, SampleText


class WandbLogger:
    """Scalars over the column `step`, samples as a table, and the settings as the run's config.

    A resumed run goes on under its id; steps that it takes again are logged again, with the same `step`.

    Example:
        WandbLogger(LoggedRun(run_dir, 0, {})).scalars(1, {"loss": 0.5})
    """

    def __init__(self, run: LoggedRun) -> None:
        self._run = wandb.init(
            dir=run.dir,
            name=run.dir.name,
            id=run.id_of("wandb", secrets.token_hex(4)),
            resume="allow" if run.resumed_step else None,
            config=dict(run.settings),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `RunLogger.scalars`."""
        self._run.log({"step": step, **values})

    def samples(self, step: int, texts: Sequence[SampleText]) -> None:
        """See `RunLogger.samples`."""
        names = list(texts[0].numbers)
        rows = [[text.prompt, text.response, *text.numbers.values()] for text in texts]
        self._run.log({"step": step, "samples": wandb.Table(["prompt", "response", *names], rows)})

    def close(self) -> None:
        """See `RunLogger.close`."""
        self._run.finish()
