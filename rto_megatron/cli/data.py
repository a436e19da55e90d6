"""`rto synthesize`, `rto tokenizer` and `rto reasoning-gym`: what a run needs before its first stage."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from rto_megatron.errors import DataError, MachineError, RecipeError

_VOCABULARY_MULTIPLE = 64  # tensor parallelism cuts the vocabulary in equal parts


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(synthesize)
    app.command()(tokenizer)
    app.command(name="reasoning-gym")(reasoning_gym)


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
    from rto_megatron.data.synthetic import write_synthetic_task
    from rto_megatron.data.synthetic_source import STYLES

    write_synthetic_task(folder, seed, style=STYLES[style], hidden_size=hidden)
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
    from transformers import LlamaConfig

    from rto_megatron.data.tokenizer import load_tokenizer, train_tokenizer

    train_tokenizer(_texts(texts), folder, vocab, byte_fallback=True)
    trained = load_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=-(-len(trained) // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        head_dim=32,
        max_position_embeddings=positions,
        bos_token_id=trained.bos_token_id,
        eos_token_id=trained.eos_token_id,
        pad_token_id=trained.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    typer.echo(f"{folder}: {len(trained)} tokens, {layers} layers of {hidden}")


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
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
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
