"""The decoder: embedding, layers, logits, for one sequence on the CPU in fp32.

Attention, dense layers and the router run here; routed experts go through the expert cache and
`kernels.expert_ffn`. Axis letters: T new tokens, D hidden, H query heads, G key/value heads, d head size, E
experts, K experts per token, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flashmoe.config import ModelConfig
from flashmoe.expert_cache import ExpertCache
from flashmoe.kv_cache import KVCache
from flashmoe.layers import Rotary, attention, rms_norm, rotate
from flashmoe.router import route
from flashmoe.weights import DenseWeights, LayerWeights
from kernels.expert_ffn import ExpertFFN, ExpertWeights, Routing
from kernels.mixed_linear import MixedLinear


class Decoder:
    """Appends tokens to the KV cache and returns logits. `check` is called before every layer."""

    def __init__(
        self, config: ModelConfig, weights: DenseWeights, experts: ExpertCache, context: int
    ) -> None:
        self.config, self.experts = config, experts
        self.kv_cache = KVCache(config, context)
        self._weights = weights
        self._rotary = Rotary(config, context)
        self._linear = MixedLinear()
        self._ffn = ExpertFFN(config.hidden_act, self._linear)

    @torch.inference_mode()
    def forward(
        self, token_ids: Sequence[int], all_logits: bool = False, check: Callable[[], None] | None = None
    ) -> Tensor:
        """Run T tokens behind those in the KV cache -> logits [V] of the last one, or [T, V] with
        `all_logits`.

        The KV cache counts the tokens only when every layer has run: an exception leaves it as it was.
        """
        begin = self.kv_cache.length
        position = self._rotary.at(begin, begin + len(token_ids))
        x = self._weights.embedding[torch.tensor(token_ids)].float()  # [T, D]
        for index, layer in enumerate(self._weights.layers):
            if check is not None:
                check()
            x = x + self._attention(index, layer, x, position)
            x = x + self._feed_forward(index, layer, x)
        self.kv_cache.advance(len(token_ids))
        x = rms_norm(x if all_logits else x[-1:], self._weights.norm, self.config.rms_norm_eps)
        logits = self._linear(x, self._weights.lm_head)
        return logits if all_logits else logits[0]

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

    def _feed_forward(self, index: int, layer: LayerWeights, x: Tensor) -> Tensor:
        h = rms_norm(x, layer.post_attention_norm, self.config.rms_norm_eps)
        if layer.router is None:
            return self._mlp(layer, h)
        ids, weights = route(h, layer.router, self.config.num_experts_per_tok, self.config.norm_topk_prob)
        y = self._one_token(index, h, ids, weights) if len(h) == 1 else self._chunk(index, h, ids, weights)
        if layer.shared_gate is not None:
            y = y + torch.sigmoid(h @ layer.shared_gate.T) * self._mlp(layer, h)
        return y

    def _mlp(self, layer: LayerWeights, h: Tensor) -> Tensor:
        assert layer.mlp is not None
        return self._ffn.feed_forward(h, ExpertWeights(*layer.mlp))

    def _one_token(self, index: int, h: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """h [1, D] -> [1, D]: hits while misses are read, late ones as they arrive, added in top-k order."""
        routed = ids[0].tolist()
        products = torch.empty(len(routed), h.shape[1])
        for expert, expert_weights in self.experts.fetch(index, routed, weights[0].tolist()):
            k = routed.index(expert)
            self._ffn.one_token(h, weights[0, k], expert_weights, products[k])
        return self._ffn.combine(products, len(routed))

    def _chunk(self, index: int, h: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """h [T, D] -> [T, D]: tokens grouped by expert, every expert read at most once."""
        self.experts.observe(index, ids.tolist(), weights.tolist())
        routing = Routing(ids, weights)
        products = torch.empty(ids.numel(), h.shape[1])
        for expert, expert_weights in self.experts.stream(index, routing.experts):
            self._ffn.tokens(h, routing, expert, expert_weights, products)
        return self._ffn.combine(products, ids.shape[1])
