"""What a stage gives to the chat template: the recipe's arguments, and one date for the whole run.

Templates of Llama 3 print the day. A run keeps the moment of its first start in its folder, so that prompts do not
change when it is resumed on another day.
"""

from datetime import datetime
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rto_megatron.config import schema
from rto_megatron.data.template import ChatTemplate, TemplateOptions
from rto_megatron.errors import RunFolderError
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.whole_files import write_whole
from rto_megatron.reporting.progress import say
from rto_megatron.storage.checkpoints import latest_checkpoint

MOMENT_FILE = "template_date"


def run_moment(
    config: schema.Stage, tokenizer: PreTrainedTokenizerBase, topology: Topology
) -> datetime | None:
    """When the run started first, the same on all ranks, which must all call it, after the run folder was made.

    Returns:
        None where the template prints no date.

    Raises:
        UserError: the template does not read an argument of the recipe, or the run's date cannot be read.
    """
    # Before the lead writes anything, and on every rank alike.
    if not ChatTemplate(tokenizer, TemplateOptions(config.data.template)).prints_date:
        return None
    path = config.run.dir / MOMENT_FILE
    moment = _read(path, topology.lead_value(_kept_moment(path) if topology.is_lead else "", str))
    say(f"the chat template prints the date of this run's start, {moment:%Y-%m-%d}", topology.is_lead)
    return moment


def _kept_moment(path: Path) -> str:
    """The run's moment; a run without one gets the clock's, to the second."""
    if path.is_file():
        return path.read_text().strip()
    if latest_checkpoint(path.parent):
        say(f"warning: {path} is missing, so the prompts of this run print another date from here on", True)
    moment = datetime.now().isoformat(timespec="seconds")
    write_whole(path, f"{moment}\n")
    return moment


def _read(path: Path, text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise RunFolderError(
            f"{path} holds {text!r:.40}, expected the moment of the run's start, such as 2026-01-31T09:30:00; write "
            "that, or remove the file to take the clock's"
        ) from error
