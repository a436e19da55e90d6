"""Keeps what was sampled in the run folder, for people who look at a run: `rto rollouts`, `rto view`."""

import copy
import time
from collections.abc import Callable, Sequence

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from rto_megatron.config import schema
from rto_megatron.data.token_text import TokenText
from rto_megatron.reporting.rollout_files import RolloutFiles, forget_after
from rto_megatron.reporting.rollout_table import StepRollouts, gathered, rollout_table
from rto_megatron.trainer.setup import Setup
from rto_megatron.types import Experience, Metrics, ScoredRollouts


class RolloutBook:
    """Keeps the rollouts of this replica's last `run.keep_rollouts` steps; without that key it keeps nothing.

    Make it after the run, before the first step: rollouts behind the checkpoint that a run goes on from are removed.

    Example:
        book = RolloutBook(config, setup, run.step)
        run.record(book.keep(run.step + 1, scored, experience))
    """

    def __init__(self, config: schema.ReinforcementStage, setup: Setup, resumed_step: int) -> None:
        topology, num_kept = setup.topology, config.run.keep_rollouts
        self._files: RolloutFiles | None = None
        if num_kept is None:
            return
        if topology.is_lead:
            forget_after(config.run.dir, resumed_step)
        topology.barrier()
        if topology.is_replica_lead:
            self._files = RolloutFiles(
                config.run.dir, topology.data_rank, num_kept, _tabulation(setup.tokenizer)
            )

    def keep(self, step: int, scored: ScoredRollouts, experience: Experience) -> Metrics:
        """Hands the rollouts of `step`, counted from 1, to the thread that writes them.

        Returns:
            For how long the loop was held up.

        Raises:
            RunFolderError: those of the step before could not be written.
        """
        if self._files is None:
            return {}
        start = time.monotonic()
        self._files.write(gathered(step, scored, experience))
        return {"time/rollouts_s": (time.monotonic() - start, 1.0)}

    def close(self) -> None:
        """Waits for what is still being written.

        Raises:
            RunFolderError: it could not be written.
        """
        if self._files is not None:
            self._files.close()


def _tabulation(tokenizer: PreTrainedTokenizerBase) -> Callable[[StepRollouts], pa.Table]:
    own = copy.deepcopy(tokenizer)  # one is not made for two threads

    def decode(ids: Sequence[int]) -> str:
        return str(own.decode(list(ids), clean_up_tokenization_spaces=False))

    text = TokenText(decode, anchor=own.encode("a", add_special_tokens=False)[-1])
    return lambda kept: rollout_table(kept, decode, text)
