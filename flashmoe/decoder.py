"""The decoder: embedding, layers, logits, on the CPU, activations in fp32.

Of a layer, attention and router are one native call, its experts a few more. One token, a chunk of them, or
tokens of several sequences take the same way, and a token's bits do not depend on who runs beside it; they
differ in how experts are asked for. Axis letters: T new tokens, B sequences, D hidden, d head size, E
experts, K experts per token, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_policies.replay import serving_order
from flashmoe.budget import MOST_STEP_TOKENS
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


class Stretch(NamedTuple):
    """New tokens of one sequence."""

    kv_cache: Any  # a KVCache, or on a GPU a GpuKVCache
    tokens: list[int]


# Addresses of cos, sin and the table of sequences, and how many there are.
Sequences = tuple[int, int, int, int]


class LayerBuffers(NamedTuple):
    """What a layer's router writes for T tokens."""

    h: Tensor  # [T, D]: what the experts see
    probabilities: Tensor  # [T, E]
    ids: Tensor  # [T, K] int32
    weights: Tensor  # [T, K]

    @property
    def scores(self) -> NDArray[np.float32]:
        """The probabilities, in the same memory."""
        return self.probabilities.numpy()

    @property
    def addresses(self) -> tuple[int, int, int, int]:
        return self.h.data_ptr(), self.probabilities.data_ptr(), self.ids.data_ptr(), self.weights.data_ptr()

    def part(self, rows: slice) -> "LayerBuffers":
        """Those of some of the tokens."""
        return LayerBuffers(*(tensor[rows] for tensor in self))

    @classmethod
    def of(cls, config: ModelConfig, tokens: int) -> "LayerBuffers":
        h = torch.empty(tokens, config.hidden_size)
        probabilities = torch.empty(tokens, config.num_experts)
        ids = torch.empty(tokens, config.num_experts_per_tok, dtype=torch.int32)
        weights = torch.empty(tokens, config.num_experts_per_tok)
        return cls(h, probabilities, ids, weights)


class Decoder:
    """Appends tokens to KV caches and returns logits. `check` is called before every layer. `kv_cache` is
    that of a sequence of its own.

    `expert_format`: how experts are stored. `exact`: fp32 activations also for int4 and int8 weights. Whoever
    wants to see what experts are given puts a subclass of ExpertFFN in `expert_ffn`; whoever wants to see the
    routing, an `observer`.
    """

    runs_prompts_together = True  # a chunk may hold tokens of several, and gives each what it gets alone

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
        self._expert_format = expert_format
        self.kv_cache = KVCache(config, context)
        self._weights, self._exact = weights, exact
        self._rotary = Rotary(config, context)
        self._activation = ACTIVATIONS[config.hidden_act]
        native_experts = Experts(
            config.hidden_size, config.moe_intermediate_size, expert_format, self._activation, exact
        )
        self.expert_ffn = ExpertFFN(kernels, native_experts, config.hidden_size, config.num_experts_per_tok)
        self._layers = [
            _NativeLayer(config, layer, self.kv_cache.offsets(index), index, exact)
            for index, layer in enumerate(weights.layers)
        ]
        self._one_token = LayerBuffers.of(config, 1)
        self.observer: RoutingObserver | None = None
        self.prefetcher: Prefetcher | None = None

    def forward(
        self, token_ids: Sequence[int], all_logits: bool = False, check: Callable[[], None] | None = None
    ) -> Tensor:
        """Run T tokens behind those in its own KV cache -> logits [V] of the last one, or [T, V] with
        `all_logits`. Errors as in `forward_batch`."""
        logits = self.forward_batch([Stretch(self.kv_cache, list(token_ids))], check, all_logits)
        return logits if all_logits else logits[0]

    @torch.inference_mode()
    def forward_batch(
        self, batch: Sequence[Stretch], check: Callable[[], None] | None = None, all_logits: bool = False
    ) -> Tensor:
        """Run new tokens of B sequences, T in all -> logits [B, V] of each one's last, or of all: [T, V].

        The KV caches count the tokens only when every layer has run: an exception leaves them as they were.
        """
        token_ids = [token for stretch in batch for token in stretch.tokens]
        x = self.embed(token_ids)
        step = self._step(batch, token_ids)
        if self.observer is not None:
            self.observer.forward_begins(token_ids)
        if self.prefetcher is not None:
            self.prefetcher.forward_begins(token_ids)
        for index in range(self.config.num_hidden_layers):
            if check is not None:
                check()
            self._layer(index, x, step)
        if self.observer is not None:
            self.observer.forward_ends()
        if self.prefetcher is not None:
            self.prefetcher.forward_ends()
        for stretch in batch:
            stretch.kv_cache.append(stretch.tokens)
        if not all_logits:
            x = last_rows(batch, x)
        return self.logits(x)

    def settle(self) -> None:
        """Policy and counters know of all that has run: here always."""

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """[T, D]: what enters the first layer."""
        return gather_rows(self._weights.embedding.matrix, token_ids, self.config.hidden_size)

    def twin(self, kernels: Context) -> "Decoder":
        """Another one over the same weights and experts, with threads and workspace of its own: it may be in
        the middle of a layer while this one is."""
        return Decoder(
            self.config, self._weights, self.experts, self.kv_cache.context, kernels, self._expert_format,
            self._exact,
        )  # fmt: skip

    @torch.inference_mode()
    def run_layer(self, index: int, x: Tensor) -> None:
        """One layer alone for a text's first T tokens, x [T, D] in place; keys and values are overwritten."""
        assert self.kv_cache.length == 0
        tokens = [-1] * len(x)
        self._layer(index, x, self._step([Stretch(self.kv_cache, tokens)], tokens))

    def _step(self, batch: Sequence[Stretch], token_ids: list[int]) -> "_Step":
        table = np.array([(s.kv_cache.address, s.kv_cache.length, len(s.tokens)) for s in batch], np.int64)
        for stretch in batch:
            room = stretch.kv_cache.context - stretch.kv_cache.length
            assert stretch.kv_cache.context == self.kv_cache.context and len(stretch.tokens) <= room
        buffers = self._one_token if len(token_ids) == 1 else LayerBuffers.of(self.config, len(token_ids))
        together = len(batch) > 1 and len(token_ids) <= MOST_STEP_TOKENS
        return _Step(token_ids, self.sequences(table), buffers, together, table)

    def _layer(self, index: int, x: Tensor, step: "_Step") -> None:
        """x [T, D] += attention, then += feed-forward."""
        if not self.has_experts(index):
            self.dense_layer(index, x, step.sequences)
            return
        buffers = step.buffers
        self.attend_and_route(index, x, step.sequences, buffers)
        if self.observer is not None:
            self.observer.routed(index, buffers.ids, buffers.weights, buffers.probabilities)
        self.expert_ffn.begin(buffers.h)
        if len(x) == 1:
            self._experts_of_one_token(index, x, step)
        else:
            self._experts_of_many(index, x, step)
        self.add_routed(x, buffers)
        if self.has_shared_expert(index):
            self.add_shared(index, x, buffers.h)

    def has_experts(self, index: int) -> bool:
        """Whether a layer has routed experts."""
        return self._layers[index].router is not None

    def attend_and_route(self, index: int, x: Tensor, sequences: Sequences, buffers: LayerBuffers) -> None:
        """x [T, D] += attention; `buffers` get what the router chose."""
        native = self._layers[index]
        assert native.router is not None
        self.kernels.attend_and_route(
            native.attention, native.router, *sequences, len(x), x.data_ptr(), *buffers.addresses
        )

    def add_routed(self, x: Tensor, buffers: LayerBuffers) -> None:
        """x [T, D] += the routed experts' products, all of which are there."""
        self.expert_ffn.end(buffers.weights, x)

    def has_shared_expert(self, index: int) -> bool:
        """Whether every token of a layer with experts goes through one of them."""
        return self._weights.layers[index].shared_gate is not None

    def add_shared(self, index: int, x: Tensor, h: Tensor) -> None:
        """x [T, D] += the shared expert of h [T, D]."""
        layer = self._weights.layers[index]
        assert layer.shared_gate is not None
        factor = torch.sigmoid(self._linear(h, Weight.of(layer.shared_gate)))
        self._mlp(layer, h, factor, x)

    def dense_layer(self, index: int, x: Tensor, sequences: Sequences) -> None:
        """A layer without experts: x [T, D] += attention, then += its network."""
        layer = self._weights.layers[index]
        self.kernels.attend(self._layers[index].attention, *sequences, x.data_ptr())
        self._mlp(layer, self._norm(x, layer.post_attention_norm), None, x)

    def sequences(self, table: NDArray[np.int64]) -> Sequences:
        """Of a table [B, 3] of each sequence's memory, length and new tokens, which must outlive this."""
        return (*self._rotary.addresses(0), table.ctypes.data, len(table))

    def logits(self, x: Tensor) -> Tensor:
        """Of what leaves the last layer, [N, D] -> [N, V]"""
        return self._linear(self._norm(x, self._weights.norm), self._weights.lm_head)

    def _experts_of_one_token(self, index: int, x: Tensor, step: "_Step") -> None:
        buffers = step.buffers
        ids, weights = buffers.ids[0].tolist(), buffers.weights[0].tolist()
        batches = self.experts.fetch(index, ids, weights, buffers.scores[0], step.token_ids[0])
        if self.prefetcher is not None:
            self.prefetcher.routed(self.experts, index, x, ids, buffers.scores[0])
        for batch in batches:
            self.expert_ffn.add_to_one_token(batch)

    def _experts_of_many(self, index: int, x: Tensor, step: "_Step") -> None:
        """Grouped by expert, so that each is read at most once."""
        buffers, routing = step.buffers, Routing(step.buffers.ids)
        ids, weights = buffers.ids.tolist(), buffers.weights.tolist()
        order = serving_order(buffers.ids.numpy())
        if step.together and self.experts.can_keep(len(order)):
            batches = self.experts.fetch_together(
                index, order, ids, weights, buffers.scores, step.token_ids
            )
            if self.prefetcher is not None:
                self.prefetcher.routed_together(self.experts, index, x)
            for batch in batches:
                self.expert_ffn.add(routing, [(order[place], addresses) for place, addresses in batch])
            return
        self.experts.observe(index, ids, weights, buffers.scores, step.token_ids)
        for expert, addresses in self.experts.stream(index, order):
            self.expert_ffn.add(routing, [(expert, addresses)])

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
        self, config: ModelConfig, layer: LayerWeights, kv_offsets: tuple[int, int], index: int, exact: bool
    ) -> None:
        c = config
        keys, values = kv_offsets
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
            keys=keys,
            values=values,
        )
        self.router = native_router(config, layer)


def last_rows(batch: Sequence[Stretch], x: Tensor) -> Tensor:
    """The row of each sequence's last token: x [T, D] -> [B, D]"""
    if len(batch) == 1:
        return x[-1:]
    return x[torch.from_numpy(np.cumsum([len(stretch.tokens) for stretch in batch]) - 1)]


def native_router(config: ModelConfig, layer: LayerWeights) -> Router | None:
    """None in a layer without experts."""
    c = config
    return None if layer.router is None else Router(
        c.hidden_size, c.num_experts, c.num_experts_per_tok, c.norm_topk_prob, c.rms_norm_eps,
        _address(layer.post_attention_norm), _address(layer.router),
    )  # fmt: skip


class _Step(NamedTuple):
    """What one forward pass needs in every layer."""

    token_ids: list[int]
    sequences: Sequences
    buffers: LayerBuffers
    together: bool  # a step of several sequences, as far as the expert cache is concerned
    table: NDArray[np.int64]  # the sequences' memory


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
