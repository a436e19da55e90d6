"""Errors that a user can cause and mend; the command line prints them without a traceback.

What is raised is one of the subjects below, or a class of its own that stands beside what it is about, such as
`engine/integrity.py` CheckpointError. A caller tells errors apart by their class, never by their words.
"""

from typing import Self


class UserError(ValueError):
    """Says what was found, what was expected and what to do.

    `reason` is how a run that ends with it is classed (`lifecycle/status.py`); subclasses name their own. A subject
    has none: whatever cannot work, the run is over, and its message says what to change.

    Example:
        UserError("run.steps=0; expected 1 or more").about("rto.yaml").reason == "CONFIG"
    """

    reason: str = "CONFIG"

    def about(self, subject: str) -> Self:
        """The same error, saying first what it is about: a key, a folder."""
        return type(self)(f"{subject}: {self}")


class RecipeError(UserError):
    """Keys of a recipe, or arguments of a command, cannot work, alone or together.

    Example:
        RecipeError("run.steps=0; expected 1 or more")
    """


class DataError(UserError):
    """Rows, a file of data, or how both fit tokenizer and batch.

    Example:
        DataError("pairs.jsonl:7: column 'chosen' is None, expected text; mend the row")
    """


class TokenizerError(DataError):
    """The tokenizer or its chat template is not sound, whatever row it was seen on.

    Example:
        TokenizerError("the tokenizer in models/base has no end-of-sequence token; set eos_token")
    """


class ModelFolderError(UserError):
    """A folder with a model, of Hugging Face, Megatron-LM or a run, cannot be read, or holds another model.

    Example:
        ModelFolderError("models/base has neither model.safetensors nor an index; download it again")
    """


class RunFolderError(UserError):
    """The folder of a run or evaluation is in use, is of another run, or lacks what is asked of it.

    Example:
        RunFolderError("runs/rto is in use by process 71 on host-a; name another run.dir")
    """


class ConversionError(UserError):
    """A conversion is not possible, or what it wrote is not what it read.

    Example:
        ConversionError("models/new has other numbers in lm_head.weight than models/base; convert it again")
    """


class PoolError(UserError):
    """An inference server, or the push of weights to the servers, failed.

    Example:
        PoolError("inference server http://10.0.0.2:8000 holds weight version 3, expected 4")
    """


class RewardError(UserError):
    """A source of rewards failed, or gave something else than it has to; nothing was trained on.

    Example:
        RewardError("rewards.short: rules.py:short returned None for p7, expected one number")
    """


class JudgeError(UserError):
    """The endpoint that judges answers cannot be used, or what it says is no verdict.

    Example:
        JudgeError("http://127.0.0.1:8000/v1 refused a request with status 401; the key is wrong")
    """


class MachineError(UserError):
    """The machine or its packages are in the way: ports, disk, GPUs, the environment of the process.

    Example:
        MachineError("cannot listen on 127.0.0.1:8000; stop what uses it or choose another port")
    """


# Special ones before general ones: an error is of the first that fits.
SUBJECTS: tuple[type[UserError], ...] = (
    RecipeError,
    TokenizerError,
    DataError,
    ModelFolderError,
    RunFolderError,
    ConversionError,
    PoolError,
    RewardError,
    JudgeError,
    MachineError,
)
_SHOWN = 20


def refuse_if(problems: list[str], heading: str, kind: type[UserError]) -> None:
    """Does nothing without problems.

    Raises:
        UserError: of `kind`, with the heading and the first twenty problems, one a line.
    """
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise kind("\n  ".join([f"{heading}:", *problems[:_SHOWN], *more]))
