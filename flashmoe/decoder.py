"""The decoder: embedding, layers, logits, for one sequence on the CPU, activations in fp32.

Of a layer, attention and router are one native call, its experts a few more. One token or a chunk of them
take the same way and give the same bits; they differ in how experts are asked for. Axis letters: T new
tokens, D hidden, d head size, E experts, K experts per token, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_policies.replay import serving_order
from flashmoe.config import ModelConfig
from flashmoe.expert_cache import ExpertCache
from flashmoe.kv_cache import KVCache
from flashmoe.prefetch import Prefetcher
from flashmoe.rotary import Rotary
from flashmoe.weights import DenseWeights, LayerWeights, Weight
from kernels.expert_ffn import ExpertFFN, Routing
from kernels.native import ACTIVATIONS, Attention, Context, Experts, Format, Router, gather_rows

_QK_NORMS = {"none": 0, "head": 1, "full": 2}


class RoutingObserver(Protocol):
    """Who wants to see what the router chose. The tensors are the decoder's own: read them at once, copy what
    is to stay. A forward pass that an error cut short has no end; the next one begins."""

    def forward_begins(self, token_ids: Sequence[int]) -> None:
        """T tokens are about to run through the layers together."""

    def routed(self, layer: int, ids: Tensor, weights: Tensor, probabilities: Tensor) -> None:
        """A layer with experts has routed them: ids [T, K] int32, weights [T, K], probabilities [T, E]."""

    def forward_ends(self) -> None:
        """All layers have run. An error here leaves the KV cache as it was."""


class Decoder:
    """Appends tokens to the KV cache and returns logits. `check` is called before every layer.

    `expert_format`: how experts are stored. `exact`: fp32 activations also for int4 and int8 weights. Whoever
    wants to see what experts are given puts a subclass of ExpertFFN in `expert_ffn`; whoever wants to see the
    routing, an `observer`.
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
        self.config, self.experts, self.kernels = config, experts, kernels
        self.kv_cache = KVCache(config, context)
        self._weights, self._exact = weights, exact
        self._rotary = Rotary(config, context)
        self._activation = ACTIVATIONS[config.hidden_act]
        native_experts = Experts(
            config.hidden_size, config.moe_intermediate_size, expert_format, self._activation, exact
        )
        self.expert_ffn = ExpertFFN(kernels, native_experts, config.hidden_size, config.num_experts_per_tok)
        self._layers = [
            _NativeLayer(config, layer, self.kv_cache, index, exact)
            for index, layer in enumerate(weights.layers)
        ]
        self._one_token = _Buffers.of(config, 1)
        self.observer: RoutingObserver | None = None
        self.prefetcher: Prefetcher | None = None

    @torch.inference_mode()
    def forward(
        self, token_ids: Sequence[int], all_logits: bool = False, check: Callable[[], None] | None = None
    ) -> Tensor:
        """Run T tokens behind those in the KV cache -> logits [V] of the last one, or [T, V] with
        `all_logits`.

        The KV cache counts the tokens only when every layer has run: an exception leaves it as it was.
        """
        tokens, begin = len(token_ids), self.kv_cache.length
        assert begin + tokens <= self.kv_cache.context, "more tokens than the context holds"
        x = self.embed(token_ids)
        buffers = self._one_token if tokens == 1 else _Buffers.of(self.config, tokens)
        position = (*self._rotary.addresses(begin), begin, tokens)
        if self.observer is not None:
            self.observer.forward_begins(token_ids)
        if self.prefetcher is not None:
            self.prefetcher.forward_begins(token_ids)
        for index in range(self.config.num_hidden_layers):
            if check is not None:
                check()
            self._layer(index, x, buffers, position, token_ids)
        if self.observer is not None:
            self.observer.forward_ends()
        if self.prefetcher is not None:
            self.prefetcher.forward_ends()
        self.kv_cache.advance(tokens)
        x = self._norm(x if all_logits else x[-1:], self._weights.norm)
        logits = self._linear(x, self._weights.lm_head)
        return logits if all_logits else logits[0]

    def settle(self) -> None:
        """Policy and counters know of all that has run: here always."""

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """[T, D]: what enters the first layer."""
        return gather_rows(self._weights.embedding.matrix, token_ids, self.config.hidden_size)

    @torch.inference_mode()
    def run_layer(self, index: int, x: Tensor) -> None:
        """One layer alone for a text's first T tokens, x [T, D] in place; keys and values are overwritten."""
        assert self.kv_cache.length == 0
        position = (*self._rotary.addresses(0), 0, len(x))
        self._layer(index, x, _Buffers.of(self.config, len(x)), position, [-1] * len(x))

    def _layer(
        self, index: int, x: Tensor, buffers: "_Buffers", position: tuple[int, int, int, int],
        token_ids: Sequence[int],
    ) -> None:  # fmt: skip
        """x [T, D] += attention, then += feed-forward."""
        native, layer = self._layers[index], self._weights.layers[index]
        if native.router is None:
            self.kernels.attend(native.attention, *position, x.data_ptr())
            self._mlp(layer, self._norm(x, layer.post_attention_norm), None, x)
            return
        self.kernels.attend_and_route(
            native.attention, native.router, *position, x.data_ptr(), *buffers.addresses
        )
        if self.observer is not None:
            self.observer.routed(index, buffers.ids, buffers.weights, buffers.probabilities)
        self.expert_ffn.begin(buffers.h)
        if len(x) == 1:
            ids, weights = buffers.ids[0].tolist(), buffers.weights[0].tolist()
            batches = self.experts.fetch(index, ids, weights, buffers.scores[0], token_ids[0])
            if self.prefetcher is not None:
                self.prefetcher.routed(self.experts, index, x, ids, buffers.scores[0])
            for batch in batches:
                self.expert_ffn.add_to_one_token(batch)
        else:  # grouped by expert, so that each is read at most once
            ids, weights = buffers.ids.tolist(), buffers.weights.tolist()
            self.experts.observe(index, ids, weights, buffers.scores, token_ids)
            routing = Routing(buffers.ids)
            for expert, addresses in self.experts.stream(index, serving_order(buffers.ids.numpy())):
                self.expert_ffn.add(routing, expert, addresses)
        self.expert_ffn.end(buffers.weights, x)
        if layer.shared_gate is not None:
            factor = torch.sigmoid(self._linear(buffers.h, Weight.of(layer.shared_gate)))
            self._mlp(layer, buffers.h, factor, x)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        y = torch.empty_like(x)
        tokens, hidden = x.shape
        self.kernels.rms_norm(
            x.data_ptr(), weight.data_ptr(), tokens, hidden, self.config.rms_norm_eps, y.data_ptr()
        )
        return y

    def _linear(self, x: Tensor, weight: Weight) -> Tensor:
        """x [T, K], contiguous -> [T, N]"""
        y = torch.empty(len(x), weight.rows)
        self.kernels.linear(weight.matrix, 0, x.data_ptr(), len(x), self._exact, y.data_ptr(), weight.rows)
        return y

    def _mlp(self, layer: LayerWeights, h: Tensor, factor: Tensor | None, x: Tensor) -> None:
        """x [T, D] += factor [T, 1] * the dense network or shared expert of h [T, D]."""
        assert layer.mlp is not None
        gate, up, down = (weight.matrix for weight in layer.mlp)
        self.kernels.mlp(
            self._activation, gate, up, down, h.data_ptr(), len(h), self._exact,
            0 if factor is None else factor.data_ptr(), x.data_ptr(),
        )  # fmt: skip


class _NativeLayer:
    """One layer's attention and router as the native library takes them; no router in one without experts."""

    def __init__(
        self, config: ModelConfig, layer: LayerWeights, kv_cache: KVCache, index: int, exact: bool
    ) -> None:
        c = config
        keys, values = kv_cache.tensors(index)
        self.attention = Attention(
            hidden=c.hidden_size,
            heads=c.num_attention_heads,
            kv_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            qk_norm=_QK_NORMS[c.family.qk_norm],
            window=c.sliding_windows[index] or 0,
            exact=exact,
            eps=c.rms_norm_eps,
            clip=c.clip_qkv or 0.0,
            input_norm=_address(layer.input_norm),
            qkv=layer.qkv.matrix,
            qkv_bias=_address(layer.qkv_bias),
            q_norm=_address(layer.q_norm),
            k_norm=_address(layer.k_norm),
            o=layer.o.matrix,
            o_bias=_address(layer.o_bias),
            keys=_address(keys),
            values=_address(values),
        )
        self.router = native_router(config, layer)


def native_router(config: ModelConfig, layer: LayerWeights) -> Router | None:
    """None in a layer without experts."""
    c = config
    return None if layer.router is None else Router(
        c.hidden_size, c.num_experts, c.num_experts_per_tok, c.norm_topk_prob, c.rms_norm_eps,
        _address(layer.post_attention_norm), _address(layer.router),
    )  # fmt: skip


class _Buffers(NamedTuple):
    """What the router writes for T tokens."""

    h: Tensor  # [T, D]: what the experts see
    probabilities: Tensor  # [T, E]
    ids: Tensor  # [T, K] int32
    weights: Tensor  # [T, K]
    scores: NDArray[np.float32]  # the probabilities' memory
    addresses: tuple[int, int, int, int]

    @classmethod
    def of(cls, config: ModelConfig, tokens: int) -> "_Buffers":
        h = torch.empty(tokens, config.hidden_size)
        probabilities = torch.empty(tokens, config.num_experts)
        ids = torch.empty(tokens, config.num_experts_per_tok, dtype=torch.int32)
        weights = torch.empty(tokens, config.num_experts_per_tok)
        addresses = (h.data_ptr(), probabilities.data_ptr(), ids.data_ptr(), weights.data_ptr())
        return cls(h, probabilities, ids, weights, probabilities.numpy(), addresses)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
