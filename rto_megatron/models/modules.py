"""Modules of a GPTModel that are ours: core attention of packed sequences, knowledge of its groups, a scalar head."""

import math

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from rto_megatron.models.cpu_attention import attend_short, derives_faster
from rto_megatron.models.head_memory import PART_QUERIES
from rto_megatron.models.packed_rows import PackedRow, attend_at_once, has_kernel


class PackedCoreAttention(MegatronModule):  # type: ignore[misc]  # megatron-core has no types
    """Causal attention of the heads on this tensor rank, in the layers with a window to the last tokens of it.

    Padded rows need no mask: padding is on the right, so causality alone keeps it away from real tokens.

    Example:
        output = attention.forward(query, key, value, mask, packed_seq_params=packed)
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *_: object,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        **__: object,
    ) -> None:
        super().__init__(config=config)
        self.softcap = softcap
        has_window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if has_window else None
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
    ) -> Tensor:
        """Packed: query [t, n, d] -> [t, n * d]. Padded: [s, b, n, d] -> [s, b, n * d]."""
        assert attention_mask is None and attention_bias is None
        if packed_seq_params is None:
            out = self.attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))  # [b, n, s, d]
            out = out.permute(2, 0, 1, 3)
            return out.reshape(*out.shape[:2], -1)
        queries = keys = packed_seq_params
        if (sharing := packed_seq_params.sharing) is not None:
            queries, keys = sharing.queries, sharing.keys
            key, value = sharing.seen(key), sharing.seen(value)
        if self.softcap is None and has_kernel(query, value):
            return attend_at_once(query, key, value, queries, keys, self.window, self.softmax_scale).flatten(
                1
            )
        split = ((query, queries), (key, keys), (value, keys))
        pieces = zip(*(x.split(row.lengths) for x, row in split), strict=True)
        outs = [self.attend(*(x.transpose(0, 1)[None] for x in piece))[0].transpose(0, 1) for piece in pieces]
        out = torch.cat(outs)
        return out.reshape(out.shape[0], -1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[b, n, s, d] -> the same; keys may begin before the queries, and end with them."""
        length, before = key.shape[2], key.shape[2] - query.shape[2]
        if self.softcap is not None or (self.window is not None and length > self.window):
            return self._attend_in_parts(query, key, value)
        if not before and derives_faster(query, value):
            return attend_short(query, key, value, self.softmax_scale)
        sees = causal_lower_right(query.shape[2], length) if before else None
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=sees,
            is_causal=sees is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _attend_in_parts(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `attend`, some queries at a time, each part with the keys that one of them sees."""
        # Heads apart: of torch's kernels those that take a mask without keeping all scores know no groups.
        groups, outs = query.shape[1] // key.shape[1], []
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        window = self.window or key.shape[2]
        step = PART_QUERIES if self.softcap is not None else max(PART_QUERIES, window)
        for first in range(0, query.shape[2], step):
            own = query[:, :, first : first + step]
            at = key.shape[2] - query.shape[2] + first  # of the first query, among the keys
            keys = slice(max(0, at + 1 - window), at + own.shape[2])
            seen = own.new_ones(own.shape[2], keys.stop - keys.start, dtype=torch.bool)
            seen = seen.tril(at - keys.start).triu(at - keys.start + 1 - window)
            outs.append(self._attend_masked(own, key[:, :, keys], value[:, :, keys], seen))
        return torch.cat(outs, 2)

    def _attend_masked(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        if self.softcap is None:
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask=seen, scale=self.softmax_scale
            )
        # No kernel has a cap: the backward pass computes the scores of these queries again.
        attended: Tensor = checkpoint(
            self._attend_capped, query, key, value, seen, use_reentrant=False, preserve_rng_state=False
        )
        return attended

    def _attend_capped(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        assert self.softcap is not None
        scores = (query @ key.transpose(2, 3)) * self.softmax_scale
        scores = torch.tanh(scores / self.softcap) * self.softcap
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.float32)
        return weights.to(query.dtype) @ value


class GroupedGPT(GPTModel):  # type: ignore[misc]  # megatron-core has no types
    """Megatron's model, which knows its groups also where 0.19.2 asks the global state: a tied output weight, padding
    under sequence parallelism; and the places of tokens in a row whose sequences share prompts.

    Example:
        GroupedGPT(config, layers, vocab_size, max_sequence_length, pg_collection=topology.groups)
    """

    def _preprocess(
        self,
        *,
        padding_mask: Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
        **inputs: object,
    ) -> tuple[object, ...]:
        """Megatron's, with the tensor rank's part of the padding [b, s] on every pipeline stage."""
        embedded, angles, *made, _ = super()._preprocess(
            padding_mask=None, packed_seq_params=packed_seq_params, **inputs
        )
        if packed_seq_params is not None and (sharing := packed_seq_params.sharing) is not None:
            angles = angles[sharing.places]
        made = [embedded, angles, *made]
        if padding_mask is not None and self.config.sequence_parallel:
            padding_mask = padding_mask.chunk(self.tp_group.size(), 1)[self.tp_group.rank()]
        return (*made, padding_mask)

    def tie_embeddings_and_output_weights_state_dict(
        self,
        sharded_state_dict: ShardedStateDict,
        output_layer_weight_key: str,
        first_stage_word_emb_key: str,
        metadata: dict[str, object],
    ) -> None:
        """Names the last stage's copy a replica of the embedding, in place; called by `sharded_state_dict`."""
        if self.pre_process or not self.post_process:  # the stage has no copy
            return
        group = metadata["dp_cp_group"]
        assert isinstance(group, dist.ProcessGroup)
        sharded_state_dict[output_layer_weight_key] = make_tp_sharded_tensor_for_checkpoint(
            tensor=self.shared_embedding_or_output_weight(),
            key=first_stage_word_emb_key,
            replica_id=(1, 0, group.rank()),
            allow_shape_mismatch=True,
            tp_group=self.tp_group,
            dp_cp_group=group,
        )


class ScalarHead(MegatronModule):  # type: ignore[misc]  # megatron-core has no types
    """One number per token, replicated over tensor ranks. hidden [s, b, h] -> [s, b, 1].

    With sequence parallelism every tensor rank sees its own part of the tokens: the weight is tagged so that its
    gradient is summed over tensor ranks, and the gathered output's gradient is cut, not summed, because each rank
    computes the same loss.

    Example:
        values = ScalarHead(config, group)(hidden)[0]
    """

    def __init__(self, config: TransformerConfig, group: dist.ProcessGroup) -> None:
        super().__init__(config=config)
        self.tp_group = group
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # megatron reads it there

    def forward(
        self, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """Called by GPTModel with the signature of its output layer."""
        values = functional.linear(hidden, self.weight).float()
        if self.config.sequence_parallel:
            values = gather_from_sequence_parallel_region(
                values, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return values, None
