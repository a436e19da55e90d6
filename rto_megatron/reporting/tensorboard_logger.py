"""TensorBoard: <run>/tensorboard. A resumed run hides the steps that it takes again."""

import html
from collections.abc import Mapping, Sequence

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from rto_megatron.reporting.loggers import LoggedRun, SampleText


class TensorboardLogger:
    """Scalars, samples as text, and the settings as hyperparameters.

    Example:
        TensorboardLogger(LoggedRun(run_dir, 0, {})).scalars(1, {"loss": 0.5})
    """

    def __init__(self, run: LoggedRun) -> None:
        self._board = SummaryWriter(str(run.dir / "tensorboard"), purge_step=run.resumed_step + 1)
        # What `add_hparams` does, but for the sub-folder that it makes for each call.
        for summary in hparams(dict(run.settings), {}):
            self._board._get_file_writer().add_summary(summary)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `RunLogger.scalars`."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def samples(self, step: int, texts: Sequence[SampleText]) -> None:
        """See `RunLogger.samples`; TensorBoard reads Markdown, so a sample is set as code."""
        parts = []
        for text in texts:
            numbers = ", ".join(f"{name} {value:+.3f}" for name, value in text.numbers.items())
            parts.append(f"{numbers}\n\n{_code(text.prompt)}\n\n{_code(text.response)}")
        self._board.add_text("samples", "\n\n---\n\n".join(parts), step)

    def close(self) -> None:
        """See `RunLogger.close`."""
        self._board.close()


def _code(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"
