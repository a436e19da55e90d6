"""SwanLab. Its mode and key are SwanLab's own variables: SWANLAB_MODE=offline, SWANLAB_API_KEY, ..."""

import math
from collections.abc import Mapping, Sequence

import swanlab

from rto_megatron.reporting.loggers import LoggedRun, SampleText


class SwanlabLogger:
    """Scalars, samples as text, and the settings as the experiment's config.

    Example:
        SwanlabLogger(LoggedRun(run_dir, 0, {})).scalars(1, {"loss": 0.5})
    """

    def __init__(self, run: LoggedRun) -> None:
        self._run = swanlab.init(
            logdir=str(run.dir / "swanlab"), experiment_name=run.dir.name, config=dict(run.settings)
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `RunLogger.scalars`."""
        self._run.log({name: value for name, value in values.items() if math.isfinite(value)}, step=step)

    def samples(self, step: int, texts: Sequence[SampleText]) -> None:
        """See `RunLogger.samples`."""
        shown = [
            swanlab.Text(f"{text.prompt}\n---\n{text.response}", caption=str(dict(text.numbers)))
            for text in texts
        ]
        self._run.log({"samples": shown}, step=step)

    def close(self) -> None:
        """See `RunLogger.close`."""
        self._run.finish()
