"""The decoder: embedding, layers, logits, for one sequence on the CPU, activations in fp32.

One token goes through native code a layer at a time: attention and router are one call, experts one more where
all of them are resident. A prefill chunk uses the same matrix kernels with torch's attention between them.
Axis letters: T new tokens, D hidden, H query heads, G key/value heads, d head size, E experts, K experts per token,
V vocabulary.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from flashmoe.config import ModelConfig
from flashmoe.expert_cache import ExpertCache
from flashmoe.kv_cache import KVCache
from flashmoe.layers import Rotary, attention, rms_norm, rotate
from flashmoe.router import route
from flashmoe.weights import DenseWeights, LayerWeights, Weight
from kernels.expert_ffn import ExpertFFN, Routing
from kernels.native import ACTIVATIONS, Attention, Context, Experts, Format, Router, gather_rows

_QK_NORMS = {"none": 0, "head": 1, "full": 2}


class Decoder:
    """Appends tokens to the KV cache and returns logits. `check` is called before every layer.

    `expert_format`: how experts are stored. `exact`: fp32 activations also for int4 and int8 weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DenseWeights,
        experts: ExpertCache,
        context: int,
        kernels: Context,
        expert_format: Format,
        exact: bool = False,
    ) -> None:
        self.config, self.experts = config, experts
        self.kv_cache = KVCache(config, context)
        self._weights, self._kernels, self._exact = weights, kernels, exact
        self._rotary = Rotary(config, context)
        self._activation = ACTIVATIONS[config.hidden_act]
        native_experts = Experts(
            config.hidden_size, config.moe_intermediate_size, expert_format, self._activation, exact
        )
        self._ffn = ExpertFFN(kernels, native_experts, config.hidden_size, config.num_experts_per_tok)
        self._one = _OneToken(config, weights, self.kv_cache, exact)

    @torch.inference_mode()
    def forward(
        self, token_ids: Sequence[int], all_logits: bool = False, check: Callable[[], None] | None = None
    ) -> Tensor:
        """Run T tokens behind those in the KV cache -> logits [V] of the last one, or [T, V] with
        `all_logits`.

        The KV cache counts the tokens only when every layer has run: an exception leaves it as it was.
        """
        x = gather_rows(self._weights.embedding.matrix, token_ids, self.config.hidden_size)  # [T, D]
        step = self._decode_layer if len(token_ids) == 1 else self._prefill_layer
        begin = self.kv_cache.length
        position = self._rotary.at(begin, begin + len(token_ids))
        for index in range(self.config.num_hidden_layers):
            if check is not None:
                check()
            step(index, x, position)
        self.kv_cache.advance(len(token_ids))
        x = rms_norm(x if all_logits else x[-1:], self._weights.norm, self.config.rms_norm_eps)
        logits = self._linear(x, self._weights.lm_head)
        return logits if all_logits else logits[0]

    # One token

    def _decode_layer(self, index: int, x: Tensor, position: tuple[Tensor, Tensor]) -> None:
        """x [1, D] += attention, then += feed-forward."""
        one, layer = self._one, self._weights.layers[index]
        cos, sin = (t.data_ptr() for t in position)
        native = one.layers[index]
        if native.router is None:
            self._kernels.attend(native.attention, cos, sin, self.kv_cache.length, x.data_ptr())
            h = rms_norm(x, layer.post_attention_norm, self.config.rms_norm_eps)
            self._mlp(layer, h, None, x)
            return
        self._kernels.attend_and_route(
            native.attention, native.router, cos, sin, self.kv_cache.length, x.data_ptr(), *one.addresses
        )
        self._ffn.begin(one.h)
        for batch in self.experts.fetch(index, one.ids.tolist(), one.weight_values.tolist()):
            self._ffn.add_to_one_token(batch)
        self._ffn.end(one.weights, x)
        self._shared_expert(layer, one.h, x)

    # A prefill chunk

    def _prefill_layer(self, index: int, x: Tensor, position: tuple[Tensor, Tensor]) -> None:
        """x [T, D] += attention, then += feed-forward: tokens grouped by expert, every expert read at most
        once."""
        layer = self._weights.layers[index]
        x += self._attention(index, layer, x, position)
        h = rms_norm(x, layer.post_attention_norm, self.config.rms_norm_eps)
        if layer.router is None:
            self._mlp(layer, h, None, x)
            return
        logits = self._linear(h, Weight.of(layer.router))
        ids, weights = route(logits, self.config.num_experts_per_tok, self.config.norm_topk_prob)
        self.experts.observe(index, ids.tolist(), weights.tolist())
        routing = Routing(ids)
        self._ffn.begin(h)
        for expert, addresses in self.experts.stream(index, routing.experts):
            self._ffn.add(routing, expert, addresses)
        self._ffn.end(weights, x)
        self._shared_expert(layer, h, x)

    def _attention(
        self, index: int, layer: LayerWeights, x: Tensor, position: tuple[Tensor, Tensor]
    ) -> Tensor:
        c = self.config
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        qkv = self._linear(rms_norm(x, layer.input_norm, c.rms_norm_eps), layer.qkv, layer.qkv_bias)
        widths = [heads * c.head_dim, kv_heads * c.head_dim, kv_heads * c.head_dim]
        q, k, v = torch.split(qkv, widths, dim=1)
        if c.family.qk_norm == "full":
            q, k = self._norm_qk(layer, q, k)
        if c.clip_qkv is not None:
            q, k, v = (t.clamp(-c.clip_qkv, c.clip_qkv) for t in (q, k, v))
        q, k, v = (t.reshape(len(x), -1, c.head_dim) for t in (q, k, v))  # [T, H or G, d]
        if c.family.qk_norm == "head":
            q, k = self._norm_qk(layer, q, k)
        keys, values = self.kv_cache.append(index, rotate(k, *position), v)
        y = attention(rotate(q, *position), keys, values, c.sliding_windows[index])
        return self._linear(y, layer.o, layer.o_bias)

    def _norm_qk(self, layer: LayerWeights, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        assert layer.q_norm is not None and layer.k_norm is not None
        eps = self.config.rms_norm_eps
        return rms_norm(q, layer.q_norm, eps), rms_norm(k, layer.k_norm, eps)

    # Both

    def _linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [T, K] -> [T, N]"""
        y = torch.empty(len(x), weight.rows)
        self._kernels.linear(
            weight.matrix, 0 if bias is None else bias.data_ptr(), x.contiguous().data_ptr(), len(x),
            self._exact, y.data_ptr(), weight.rows,
        )  # fmt: skip
        return y

    def _mlp(self, layer: LayerWeights, h: Tensor, factor: Tensor | None, x: Tensor) -> None:
        """x [T, D] += factor [T, 1] * the dense network or shared expert of h [T, D]."""
        assert layer.mlp is not None
        gate, up, down = (weight.matrix for weight in layer.mlp)
        self._kernels.mlp(
            self._activation, gate, up, down, h.data_ptr(), len(h), self._exact,
            0 if factor is None else factor.data_ptr(), x.data_ptr(),
        )  # fmt: skip

    def _shared_expert(self, layer: LayerWeights, h: Tensor, x: Tensor) -> None:
        if layer.shared_gate is not None:
            self._mlp(layer, h, torch.sigmoid(self._linear(h, Weight.of(layer.shared_gate))), x)


class _NativeLayer:
    """One layer's attention and router as the native library takes them; None: a layer without experts."""

    def __init__(
        self, config: ModelConfig, layer: LayerWeights, keys: Tensor, values: Tensor, window: int, exact: bool
    ) -> None:
        c = config

        def address(tensor: Tensor | None) -> int:
            return 0 if tensor is None else tensor.data_ptr()

        self.attention = Attention(
            hidden=c.hidden_size,
            heads=c.num_attention_heads,
            kv_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            qk_norm=_QK_NORMS[c.family.qk_norm],
            window=window,
            exact=exact,
            eps=c.rms_norm_eps,
            clip=c.clip_qkv or 0.0,
            input_norm=address(layer.input_norm),
            qkv=layer.qkv.matrix,
            qkv_bias=address(layer.qkv_bias),
            q_norm=address(layer.q_norm),
            k_norm=address(layer.k_norm),
            o=layer.o.matrix,
            o_bias=address(layer.o_bias),
            keys=address(keys),
            values=address(values),
        )
        self.router = layer.router if layer.router is None else Router(
            c.hidden_size, c.num_experts, c.num_experts_per_tok, c.norm_topk_prob, c.rms_norm_eps,
            address(layer.post_attention_norm), address(layer.router),
        )  # fmt: skip


class _OneToken:
    """What decoding a token writes into, allocated once, and the layers it goes through."""

    def __init__(
        self, config: ModelConfig, weights: DenseWeights, kv_cache: KVCache, exact: bool
    ) -> None:
        c = config
        self.h = torch.empty(1, c.hidden_size)  # what the experts see
        self.probabilities = torch.empty(c.num_experts)
        self.weights = torch.empty(1, c.num_experts_per_tok)
        self.weight_values = self.weights[0].numpy()
        self.ids = np.empty(c.num_experts_per_tok, dtype=np.int32)
        self.addresses = (
            self.h.data_ptr(),
            self.probabilities.data_ptr(),
            self.ids.ctypes.data,
            self.weights.data_ptr(),
        )
        self.layers = [
            _NativeLayer(c, layer, *kv_cache.tensors(index), c.sliding_windows[index] or 0, exact)
            for index, layer in enumerate(weights.layers)
        ]
