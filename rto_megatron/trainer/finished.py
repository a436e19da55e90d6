"""A run that has nothing left to do, told from its folder before a pool, a rank or a model is started."""

import json

from rto_megatron.config.schema import TrainStage
from rto_megatron.errors import UserError
from rto_megatron.lifecycle.status import ExitReason, read_status
from rto_megatron.storage.checkpoints import STATE, latest_checkpoint, pointer_problem
from rto_megatron.trainer.resume import fixed_keys, read_state, require_same


def is_finished(config: TrainStage) -> bool:
    """True where the last attempt reached `run.steps` of this configuration, saved that step and exported its model.

    A run whose length the data decide (`run.steps: null`) is never told finished: there may be more rows by now. What
    is odd about a folder is left to the attempt that reads all of it.
    """
    run_dir = config.run.dir
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None or pointer_problem(run_dir) or not (run_dir / "hf" / "config.json").is_file():
        return False
    try:
        status = read_status(run_dir)
        state = read_state(json.loads((checkpoint / STATE).read_text()), checkpoint)
        require_same(state.config, fixed_keys(config), run_dir)
    except (OSError, ValueError, UserError):
        return False
    return status is not None and status.reason is ExitReason.DONE and state.step == config.run.steps
