"""`rto data`, `rto rules`, `rto synthesize`, `rto tokenizer`, `rto reasoning-gym`: what runs need before they start."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rto_megatron.cli.options import Overrides, Recipe
from rto_megatron.errors import DataError, MachineError, RecipeError, UserError, refuse_if
from rto_megatron.platform.fresh_folder import fresh_folder, require_absent
from rto_megatron.platform.whole_files import write_whole

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase

    from rto_megatron.config.schema import Stage
    from rto_megatron.types import EndOfSequence

_VOCABULARY_MULTIPLE = 64  # tensor parallelism cuts the vocabulary in equal parts
_HEAD = 32  # the size of a head of a tokenizer's model
_SYNTHETIC_HEADS = 4  # of the embedded task's models


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(synthesize)
    app.command()(tokenizer)
    app.command(name="reasoning-gym")(reasoning_gym)
    app.command()(rules)
    of_data = typer.Typer(name="data", help="Look at what a stage reads, and make it.", no_args_is_help=True)
    of_data.command()(preview)
    of_data.command()(rate)
    of_data.command()(pairs)
    app.add_typer(of_data)


def pairs(
    responses: Annotated[
        str,
        typer.Argument(
            help="evaluation.jsonl of a stage that rated several responses to each prompt.",
            show_default=False,
        ),
    ],
    prompts: Annotated[
        str, typer.Option(help="The prompts that were answered: data.eval of that stage.", show_default=False)
    ],
    file: Annotated[Path, typer.Option("--out", help="File to write, .jsonl.", show_default=False)],
    by: Annotated[str, typer.Option(help="Column with the reward, as in reward/rules.")] = "score",
    noise: Annotated[
        float,
        typer.Option(
            min=0, help="The better response is chosen with probability sigmoid(its lead / noise); 0: always."
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the labels.")] = 0,
) -> None:
    """Make preference pairs of rated responses: data.train of a reward model, DPO and the other methods on pairs.

    Responses to a prompt are paired in their order, each once. Pairs of equal reward, with an empty response or with
    a chosen one that was cut are left out and counted.
    """
    _require_new_file(file)
    from rto_megatron.data.labelled_pairs import write_pairs

    counts = write_pairs(responses, prompts, file, by, noise, seed)
    typer.echo(f"{file}: {counts}")


def rules(
    folder: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    train: Annotated[int, typer.Option(min=1, help="Prompts to train on.")] = 1200,
    test: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 200,
    seed: Annotated[int, typer.Option(help="Everything follows from it.")] = 1,
) -> None:
    """Write prompts of the rule-following task, whose true reward is a program.

    The program is rto_megatron.experiments.language.rules:kept, a `function` of rewards; :credit pays it by token.
    """
    _require_folder(folder)
    from rto_megatron.experiments.language.prompts import write_prompts

    for path in write_prompts(folder, train, test, seed):
        typer.echo(str(path))


def preview(
    recipe: Recipe,
    overrides: Overrides = None,
    rows: Annotated[
        int, typer.Option(min=1, help="Rows of each source that are read, from its first.")
    ] = 1000,
    examples: Annotated[int, typer.Option(min=0, help="Examples of each source that are shown.")] = 2,
) -> None:
    """Show what a stage reads: tokens with the trained ones coloured, lengths, and what was cut, dropped and why.

    Needs the policy's tokenizer on this machine, no GPU and no weights. Without colours, trained tokens stand in ⟦ ⟧.
    """
    from rich.console import Console

    from rto_megatron.config.load import load_recipe
    from rto_megatron.data.look import data_sources, first_examples
    from rto_megatron.reporting.data_preview import print_preview

    config = load_recipe(recipe, overrides or [])
    tokenizer, eos = _tokenizer(config)
    console = Console() if Console().is_terminal else Console(width=140)
    problems = []
    for data in data_sources(config):
        if data.absence is not None and data.absence != "on the hub":
            problems.append(f"{data.key}: {data.source}: {data.absence}")
            continue
        try:
            loaded = first_examples(config, data, tokenizer, eos, rows)
        except UserError as error:
            problems.append(f"{data.key}: {error}")
        else:
            print_preview(console, data.key, loaded, tokenizer, examples)
    refuse_if(problems, f"{recipe}: {len(problems)} of its sources cannot be read", DataError)


def rate(
    recipe: Recipe,
    answers: Annotated[
        str,
        typer.Option(
            help="Rows with prompts and answers, in a layout of demonstrations or pairs.", show_default=False
        ),
    ],
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Answers that are rated, from the first.")] = 1000,
    examples: Annotated[
        int, typer.Option(min=1, help="Of the lowest and of the highest that are shown.")
    ] = 3,
) -> None:
    """Try the rewards of a recipe on answers that you have, before anything is trained or sampled.

    Runs its functions, services and verifiers as a stage would. Needs the policy's tokenizer, no weights and no pool.
    """
    from rto_megatron.config import schema
    from rto_megatron.config.load import load_recipe
    from rto_megatron.config.reward_code import running_code
    from rto_megatron.data.rated_answers import rate_answers
    from rto_megatron.reporting.progress import plain
    from rto_megatron.reporting.rated_table import extremes_table, spread_table
    from rto_megatron.reporting.samples import show

    config = load_recipe(recipe, overrides or [])
    if not isinstance(config, schema.ReinforcementStage | schema.EvaluateStage):
        raise RecipeError(f"stage {config.stage} pays no rewards; name the recipe of a stage that samples")
    tokenizer, eos = _tokenizer(config)
    for line in running_code(config.rewards):
        typer.echo(line)
    answered, report = rate_answers(config, tokenizer, eos, answers, rows)
    typer.echo(plain(report.summary()))
    rated = [(one.sample, one.given) for one in answered]
    show(spread_table(rated))
    show(extremes_table(rated, examples))


def _tokenizer(config: "Stage") -> "tuple[PreTrainedTokenizerBase, EndOfSequence]":
    from rto_megatron.planning.local_data import policy_tokenizer

    tokenizer, eos = policy_tokenizer(config)
    if tokenizer is None or eos is None:
        raise RecipeError(
            f"models.policy={config.models.policy}: there is no tokenizer on this machine, and no token can be shown "
            "without one; download the model, run the stage that writes it, or name another (models.policy=FOLDER)"
        )
    return tokenizer, eos


def synthesize(
    folder: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    seed: Annotated[int, typer.Option(help="Everything follows from it.")] = 42,
    style: Annotated[
        Literal["short", "long"], typer.Option(help="Responses of 8 to 24 tokens, or of 9 to 48.")
    ] = "short",
    hidden: Annotated[int, typer.Option(min=32, help="Hidden size of the models.")] = 128,
) -> None:
    """Write the embedded task: prompts and preference pairs with a known reward, and a tiny model.

    The data have the layouts of public sets, so every other command reads them like real data.
    """
    _require_folder(folder)
    require_absent(folder)
    _require_multiple(hidden, _SYNTHETIC_HEADS)
    from rto_megatron.data.synthetic import write_synthetic_task
    from rto_megatron.data.synthetic_source import STYLES

    with fresh_folder(folder) as partial:
        write_synthetic_task(partial, seed, style=STYLES[style], hidden_size=hidden)
    typer.echo(f"{folder}: written from seed {seed}")


def tokenizer(
    texts: Annotated[
        list[str],
        typer.Argument(help="Data files or owner/name:split whose text it learns.", show_default=False),
    ],
    folder: Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False)],
    vocab: Annotated[int, typer.Option(min=300, help="Number of token ids, at most.")] = 2048,
    hidden: Annotated[int, typer.Option(min=64, help="Hidden size of the model; heads have 32.")] = 128,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 2,
    positions: Annotated[int, typer.Option(min=16, help="Longest prompt and response, in tokens.")] = 2048,
) -> None:
    """Train a SentencePiece tokenizer on real text and write a tiny Llama configuration beside it.

    The folder is models.policy of an SFT recipe with models.random_init=true.
    """
    _require_folder(folder)
    require_absent(folder)
    _require_multiple(hidden, _HEAD)
    from rto_megatron.data.tokenizer import load_tokenizer, train_tokenizer

    with fresh_folder(folder) as partial:
        train_tokenizer(_texts(texts), partial, vocab, byte_fallback=True)
        trained = load_tokenizer(partial)
        _tiny_llama(trained, hidden, layers, positions).save_pretrained(partial)
    typer.echo(f"{folder}: {len(trained)} tokens, {layers} layers of {hidden}")


def _tiny_llama(
    trained: "PreTrainedTokenizerBase", hidden: int, layers: int, positions: int
) -> "LlamaConfig":
    from transformers import LlamaConfig

    heads = hidden // _HEAD
    return LlamaConfig(
        vocab_size=-(-len(trained) // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=1 if heads % 2 else heads // 2,  # as many heads to each
        head_dim=_HEAD,
        max_position_embeddings=positions,
        bos_token_id=trained.bos_token_id,
        eos_token_id=trained.eos_token_id,
        pad_token_id=trained.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )


def _require_new_file(file: Path) -> None:
    require_absent(file)
    _require_folder(file.parent)


def _require_folder(folder: Path) -> None:
    """What is to be written into a file would end in a traceback, after all the work."""
    taken = next((one for one in (folder, *folder.parents) if one.exists()), None)
    if taken is not None and not taken.is_dir():
        raise RecipeError(
            f"{folder}: {taken} is a file; expected the name of a folder to write; take another one"
        )


def _require_multiple(hidden: int, multiple: int) -> None:
    """transformers would say so in a traceback, once the tokenizer is trained."""
    if hidden % multiple:
        below = hidden - hidden % multiple
        raise RecipeError(
            f"--hidden {hidden}: expected a multiple of {multiple}, for heads of equal size; take {below} or "
            f"{below + multiple}"
        )


def reasoning_gym(
    task: Annotated[str, typer.Argument(help="Name of the task, as in chain_sum.", show_default=False)],
    file: Annotated[Path, typer.Option("--out", help="File to write, .jsonl.", show_default=False)],
    size: Annotated[int, typer.Option(min=1, help="Number of prompts.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the task; take another one for held-out prompts.")] = 42,
    options: Annotated[
        str, typer.Option(help='Options of the task, JSON, as in {"min_terms": 2}.', show_default=False)
    ] = "{}",
) -> None:
    """Write prompts of a reasoning-gym task, each with its right answer and what verifies another one.

    As data.train with a reward of kind reasoning_gym; as data.train of SFT the right answer is the response.
    """
    _require_new_file(file)
    from rto_megatron.config.reward_code import missing_package

    if (problem := missing_package("reasoning_gym")) is not None:
        raise MachineError(problem)
    from rto_megatron.rewards.verify_gym import rows

    try:
        chosen = json.loads(options)
    except ValueError as error:
        raise RecipeError(f"--options {options}: is not JSON ({error})") from error
    if not isinstance(chosen, dict):
        raise RecipeError(f'--options {options}: give a JSON object, as in {{"min_terms": 2}}')
    lines = [json.dumps(row) for row in rows(task, size, seed, chosen)]
    write_whole(file, "\n".join(lines) + "\n")
    typer.echo(f"{file}: {len(lines)} prompts of {task}")


def _texts(sources: list[str]) -> Iterator[str]:
    from rto_megatron.data.layouts import TEXT_COLUMNS, texts
    from rto_megatron.data.soundness import require_characters
    from rto_megatron.data.sources import read_rows

    for source in sources:
        is_silent = True
        for row in read_rows(source):
            for text in texts(row):
                is_silent = is_silent and not text.strip()
                yield require_characters(text, row.where)
        if is_silent:
            raise DataError(f"{source}: no row has a text in one of the columns {', '.join(TEXT_COLUMNS)}")
