"""Writes the synthetic task to disk: data in the public layouts, tokenizer, model folders, true reward.

    sft_train.jsonl, sft_test.jsonl                  messages
    preferences_train.jsonl, preferences_test.jsonl  prompt, prompt_id, chosen, rejected
    prompts_train.jsonl, prompts_test.jsonl          context_messages
    tokenizer/, models/{policy,reward,deep,mixture}/  Hugging Face folders; the models without weights
    true_reward.json                                 see `true_reward.TrueReward`

Responses come from the Markov source of `synthetic_source`, and preference labels are drawn from the
Bradley-Terry model on the true returns. Test rows use prompts that no training row uses.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import LlamaConfig, PreTrainedTokenizerBase, Qwen3MoeConfig

from rto_megatron.data.synthetic_source import (
    REQUESTS,
    SHORT,
    SUBJECTS,
    TOPICS,
    Language,
    Style,
    draw_language,
)
from rto_megatron.data.tokenizer import (
    ASSISTANT_MARKER,
    EOS,
    SPACE,
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)
from rto_megatron.data.true_reward import TrueReward
from rto_megatron.errors import DataError

VOCAB_SIZE = 96  # tensor parallelism splits it over 2, 4, ... ranks
MAX_POSITIONS = 256


@dataclass(frozen=True)
class Sizes:
    """Rows per file.

    Example:
        Sizes(demonstrations=100, pairs=100, prompts=100)
    """

    demonstrations: int = 6000
    eval_demonstrations: int = 256
    pairs: int = 12000
    eval_pairs: int = 400
    prompts: int = 2000
    eval_prompts: int = 256


SIZES_LONG = Sizes(demonstrations=12000, pairs=20000, eval_pairs=400, prompts=3500, eval_prompts=512)


@dataclass(frozen=True)
class _Request:
    id: str
    topic: int
    text: str

    def turn(self) -> dict[str, str]:
        return {"role": "user", "content": self.text}


def write_synthetic_task(
    out_dir: Path, seed: int, sizes: Sizes = Sizes(), style: Style = SHORT, hidden_size: int = 128
) -> None:
    """Write the whole task; the same arguments give the same files.

    Args:
        hidden_size: of the models; they have 4 heads of 32 whatever it is.

    Raises:
        UserError: more prompts are wanted than there are.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    language = draw_language(seed, style)
    rng = np.random.default_rng([seed, 1])
    requests = _draw_requests(sizes.prompts + sizes.eval_prompts, rng)
    splits = {"train": requests[: sizes.prompts], "test": requests[sizes.prompts :]}
    num_pairs = {"train": sizes.pairs, "test": sizes.eval_pairs}
    num_demonstrations = {"train": sizes.demonstrations, "test": sizes.eval_demonstrations}
    for split, split_requests in splits.items():
        _write_rows(out_dir / f"prompts_{split}.jsonl", _prompts(split_requests))
        demonstrations = _demonstrations(split_requests, num_demonstrations[split], language, rng)
        _write_rows(out_dir / f"sft_{split}.jsonl", demonstrations)
        pairs = _pairs(split_requests, num_pairs[split], language, rng)
        _write_rows(out_dir / f"preferences_{split}.jsonl", pairs)
    tokenizer = _write_tokenizer(out_dir / "tokenizer")
    _write_models(out_dir, tokenizer, hidden_size)
    fingerprint = tokenizer_fingerprint(out_dir / "tokenizer")
    true_reward_table(language, tokenizer, fingerprint, seed).save(out_dir / "true_reward.json")


def write_models_alone(out_dir: Path, hidden_size: int) -> Path:
    """Write tokenizer and model folders, which are the same for every seed, and return the policy's."""
    out_dir.mkdir(parents=True, exist_ok=True)
    _write_models(out_dir, _write_tokenizer(out_dir / "tokenizer"), hidden_size)
    return out_dir / "models" / "policy"


def _draw_requests(count: int, rng: np.random.Generator) -> list[_Request]:
    shape = (len(REQUESTS), len(TOPICS), len(SUBJECTS), len(SUBJECTS))
    available = int(np.prod(shape))
    if count > available:
        raise DataError(
            f"{count} distinct prompts are wanted and the synthetic task has {available}; ask for fewer"
        )
    requests = []
    for code in rng.choice(available, size=count, replace=False):
        form, topic, first, second = (int(index) for index in np.unravel_index(code, shape))
        text = REQUESTS[form].format(topic=TOPICS[topic], first=SUBJECTS[first], second=SUBJECTS[second])
        requests.append(_Request(f"synthetic-{code}", topic, text))
    return requests


def _answer(language: Language, words: list[int]) -> dict[str, str]:
    return {"role": "assistant", "content": " ".join(language.style.words[word] for word in words)}


def _prompts(requests: list[_Request]) -> Iterator[dict[str, object]]:
    for request in requests:
        yield {"context_messages": [request.turn()], "prompt_id": request.id}


def _demonstrations(
    requests: list[_Request], count: int, language: Language, rng: np.random.Generator
) -> Iterator[dict[str, object]]:
    for _ in range(count):
        request = requests[rng.integers(len(requests))]
        answer = _answer(language, language.sample(request.topic, rng))
        yield {"prompt": request.text, "prompt_id": request.id, "messages": [request.turn(), answer]}


def _pairs(
    requests: list[_Request], count: int, language: Language, rng: np.random.Generator
) -> Iterator[dict[str, object]]:
    for _ in range(count):
        request = requests[rng.integers(len(requests))]
        first, second = language.sample(request.topic, rng), language.sample(request.topic, rng)
        difference = language.returns(request.topic, first) - language.returns(request.topic, second)
        if rng.random() >= 1.0 / (1.0 + np.exp(-difference)):
            first, second = second, first
        yield {
            "prompt": request.text,
            "prompt_id": request.id,
            "chosen": [request.turn(), _answer(language, first)],
            "rejected": [request.turn(), _answer(language, second)],
        }


def _write_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def _write_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A vocabulary with a piece of its own for every topic and every word of requests and responses."""
    # Words come first and most often, so that merges finish them before any word of the requests.
    texts = [f" {word}" for word in (*TOPICS, *SUBJECTS)] * 50
    texts += [form.format(topic=TOPICS[0], first=SUBJECTS[0], second=SUBJECTS[1]) for form in REQUESTS]
    train_tokenizer(texts, folder, VOCAB_SIZE, byte_fallback=False)
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == VOCAB_SIZE
    return tokenizer


def _write_models(out_dir: Path, tokenizer: PreTrainedTokenizerBase, hidden_size: int) -> None:
    for role, num_layers in (("policy", 2), ("reward", 1), ("deep", 4)):
        folder = out_dir / "models" / role
        shutil.copytree(out_dir / "tokenizer", folder, dirs_exist_ok=True)
        LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        ).save_pretrained(folder)
    _write_mixture(out_dir / "models" / "mixture", out_dir / "models" / "policy", hidden_size)


def _write_mixture(folder: Path, dense: Path, hidden_size: int) -> None:
    """The dense policy's sizes, with four experts of which a token passes two."""
    shutil.copytree(dense, folder, dirs_exist_ok=True)
    sizes = json.loads((dense / "config.json").read_text())
    shared = {key: value for key, value in sizes.items() if key not in ("architectures", "model_type")}
    Qwen3MoeConfig(
        **shared,
        architectures=["Qwen3MoeForCausalLM"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=hidden_size,
        norm_topk_prob=True,
    ).save_pretrained(folder)


def true_reward_table(
    language: Language, tokenizer: PreTrainedTokenizerBase, fingerprint: str, seed: int
) -> TrueReward:
    """The language's reward over token ids."""
    topic_ids = _piece_ids(tokenizer, TOPICS)
    word_ids = _piece_ids(tokenizer, language.style.words)
    vocab = tokenizer.get_vocab()
    eos_id = vocab[EOS]
    id_of_previous = {
        **dict(enumerate(word_ids)),
        language.style.end: vocab[ASSISTANT_MARKER],
    }
    id_of_next = {**dict(enumerate(word_ids)), language.style.end: eos_id}
    entries = {
        (int(topic), id_of_previous[int(previous)], id_of_next[int(word)]): float(
            language.reward[topic, previous, word]
        )
        for topic, previous, word in np.argwhere(language.reward != 0.0)
    }
    return TrueReward(
        class_of_token={token: topic for topic, token in enumerate(topic_ids)},
        entries=entries,
        token_cost=language.token_cost,
        eos_id=eos_id,
        source_mean=language.source_mean,
        source_sd=language.source_sd,
        scale=language.scale,
        seed=seed,
        tokenizer_fingerprint=fingerprint,
    )


def _piece_ids(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> list[int]:
    ids = [tokenizer.encode(f" {word}", add_special_tokens=False) for word in words]
    assert all(len(pieces) == 1 for pieces in ids), f"{SPACE}word is to be one piece for every word"
    return [pieces[0] for pieces in ids]
