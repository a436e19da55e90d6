"""Texts that tokenizers differ on, and folders with a small SentencePiece model alone."""

import io
import json
import random
from pathlib import Path

import sentencepiece

SAMPLES = (
    "The quick brown fox.",
    "  leading and  double spaces ",
    "def f(x):\n\treturn x ** 2  # four  spaces\n\n\n",
    "東京 Привет naïve 😀👩‍🚀 \u00a0 end",
    "aaaa ---- ==== ....",
    "<|user|> hi<|assistant|> there",
    "",
)

SENTENCES = (
    "The quick brown fox jumps over the lazy dog; the dog sleeps.",
    "def add(a, b): return a + b  # sum",
    "Naïve café, 東京 and Привет: text of many scripts.",
    "Write a short answer to the question about the fox and the dog.",
)

FRAGMENTS = (
    *(
        "the",
        "dog",
        "fox",
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "-",
        "1",
        "xq",
        "\u00a0",
        "\u3000",
        "▁",
        "<0x0A>",
        "<sep>",
    ),
    *("é", "e\u0301", "か\u3099", "각", "京", "ﬁ", "①", "😀", "👩‍🚀", "<unk", "\u200d"),
)

INST = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"


def pieces_of(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def write_sentencepiece(folder: Path, **options: object) -> sentencepiece.SentencePieceProcessor:
    """A folder with SentencePiece's file alone, of a small model with ids 0 to 2 for <unk>, <s> and </s>."""
    written = io.BytesIO()
    given = {
        "vocab_size": 400,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "character_coverage": 0.9995,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5),
        model_writer=written,
        num_threads=1,
        minloglevel=2,
        **(given | options),
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return pieces_of(folder)


def configure(folder: Path, **config: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def random_texts(number: int) -> list[str]:
    rng = random.Random(0)
    return [
        "".join(rng.choice(FRAGMENTS) * rng.randint(1, 3) for _ in range(rng.randint(0, 12)))
        for _ in range(number)
    ]
