"""llama.cpp's files become Hugging Face folders: outputs of the model that was packed, and refusals."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.made_files import rto
from tiny_models import write_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig

from rto_megatron.data.tokenizer import load_tokenizer
from rto_megatron.errors import ModelFolderError

if importlib.util.find_spec("gguf") is None:
    pytest.skip("pip install -r requirements/gguf.txt", allow_module_level=True)

import gguf

_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INNER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TEMPLATE = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}"


def byte_tokenizer() -> Tokenizer:
    """A byte-level BPE as GPT-2's: the kind that llama.cpp calls gpt2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the capital of France is a short sentence about the sea"] * 4, trainer)
    return tokenizer


def as_llama_cpp(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q and k as convert_hf_to_gguf.py orders them: pairs that are turned together lie together."""
    rows, columns = weight.shape
    return weight.view(num_heads, 2, rows // num_heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _packed(name: str, tensor: torch.Tensor, config: LlamaConfig) -> tuple[str, np.ndarray]:
    if not name.startswith("model.layers."):
        return _OUTER[name], tensor.numpy()
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    value = as_llama_cpp(tensor, heads[part]) if part in heads else tensor
    return f"blk.{layer}.{_INNER[part]}.weight", value.contiguous().numpy()


def write_gguf(
    path: Path,
    model: torch.nn.Module,
    architecture: str = "llama",
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> None:
    """The file that llama.cpp's converter would write, unpacked but for float32."""
    config, tokenizer = model.config, byte_tokenizer()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    state = tokenizer.to_str()
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    tokens = [token for token, _ in vocabulary] + [
        f"<extra{n}>" for n in range(config.vocab_size - len(vocabulary))
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<pad>", "<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(state)["model"]["merges"]])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(*_packed(name, tensor, config))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_a_packed_model_comes_out_as_the_one_that_was_packed(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "source", vocab_size=320)
    write_gguf(tmp_path / "tiny.gguf", model)
    shown = rto("convert", "gguf-to-hf", tmp_path / "tiny.gguf", tmp_path / "out", "--dtype", "fp32")
    assert "bit-equal" in shown and "16 of 16 tokens as the file's" in shown
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = torch.arange(5, 60)[None]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in back.state_dict().items())
    assert back.config.rms_norm_eps == model.config.rms_norm_eps
    assert torch.allclose(back(tokens).logits, model(tokens).logits, atol=1e-5)
    tokenizer = load_tokenizer(tmp_path / "out")
    text = "the capital of the sea"
    assert tokenizer.encode(text, add_special_tokens=False) == byte_tokenizer().encode(text).ids
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template) == ("<s>", "</s>", TEMPLATE)
    rto("convert", "hf-to-megatron", tmp_path / "out", tmp_path / "checkpoint")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no such file")
    for name, said in (
        ("text.gguf", "does not begin as a GGUF file"),
        ("none.gguf", "is no file ending in .gguf"),
    ):
        with pytest.raises(ModelFolderError, match=said):
            rto("convert", "gguf-to-hf", tmp_path / name, tmp_path / "out")
    write_gguf(tmp_path / "other.gguf", write_llama(tmp_path / "source", vocab_size=320), architecture="gpt2")
    with pytest.raises(ModelFolderError, match=r"type gpt2; known families are deepseek_v3, .*llama"):
        rto("convert", "gguf-to-hf", tmp_path / "other.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _llama3(writer: gguf.GGUFWriter) -> None:
    """As Llama 3.1 and later are kept: by what each frequency is divided."""
    writer.add_tensor("rope_freqs.weight", np.linspace(1, 32, 16, dtype=np.float32))


def _yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)


def _unscaled(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_rope_scaling_factor(1.0)
    writer.add_sliding_window(256)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_llama3, r"rope_freqs\.weight, which"),
        (_yarn, r"llama\.rope\.scaling\.type=yarn, llama\.rope\.scaling\.factor=4\.0, which"),
        (lambda writer: writer.add_sliding_window(255), r"llama\.attention\.sliding_window=255, which"),
    ],
)
def test_what_transformers_leaves_unread_is_refused(
    tmp_path: Path, change: Callable[[gguf.GGUFWriter], None], said: str
) -> None:
    write_gguf(tmp_path / "tiny.gguf", write_llama(tmp_path / "source", vocab_size=320), change=change)
    with pytest.raises(ModelFolderError, match=said):
        rto("convert", "gguf-to-hf", tmp_path / "tiny.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_keys_that_scale_and_cut_nothing_are_left_unread(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", write_llama(tmp_path / "source", vocab_size=320), change=_unscaled)
    assert "bit-equal" in rto("convert", "gguf-to-hf", tmp_path / "tiny.gguf", tmp_path / "out")
