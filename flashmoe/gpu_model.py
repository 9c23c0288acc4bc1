"""A model's dense part on a GPU: its weights, and the layers' arithmetic for steps of one token a
sequence and for a chunk.

Tokens of a step run through our own kernels in fp32, as on the CPU, on buffers that never move, so that it
can be captured in CUDA graphs. A chunk's matrix products are torch's, in the weights' 16-bit type. Experts
are not here. Axis letters: T tokens, D hidden, H query heads, G KV heads, d head size, E experts, K experts
per token.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from flashmoe.config import ModelConfig
from flashmoe.gpu_attention import attend_many
from flashmoe.gpu_kv_cache import KV_DTYPE, GpuPages
from flashmoe.rotary import Rotary
from flashmoe.weights import DenseWeights, LayerWeights, Weight
from kernels.expert_slots import BITS, FLOATS
from kernels.reference import ACTIVATIONS
from kernels.triton_attention import attend_rows, attention_workspace
from kernels.triton_decode import GpuMatrix, linear
from kernels.triton_rope import rope_and_store
from kernels.triton_router import route
from kernels.triton_tiles import round_to_int8, unpack_matrix
from kernels.triton_token import embed_rows

NO_MISS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class GpuLayer:
    """`LayerWeights`, the matrices as the GPU kernels take them."""

    weights: LayerWeights
    qkv: GpuMatrix
    o: GpuMatrix
    mlp: tuple[GpuMatrix, GpuMatrix, GpuMatrix] | None
    shared_gate: GpuMatrix | None


class GpuModel:
    """Weights, rotary tables and the memory of keys and values on `device`. Runs nothing by itself."""

    def __init__(
        self, config: ModelConfig, weights: DenseWeights, pages: GpuPages, device: torch.device, exact: bool
    ) -> None:
        self.config, self.device, self.exact, self.pages = config, device, exact, pages
        rotary = Rotary(config, pages.context)
        self.cos, self.sin = rotary.cos.to(device), rotary.sin.to(device)
        self.embedding, self.norm = gpu_matrix(weights.embedding), weights.norm
        self.lm_head = gpu_matrix(weights.lm_head)
        self.layers = [_gpu_layer(layer) for layer in weights.layers]
        self.moe_layers = [i for i, moe in enumerate(config.moe_layers) if moe]

    def segments(self) -> list[range]:
        """The layers between two layers' experts: of segment s all but the last are without experts; the
        last segment has none."""
        ends = [0, *(layer + 1 for layer in self.moe_layers), len(self.layers)]
        return [range(begin, end) for begin, end in pairwise(ends)]


def gpu_matrix(weight: Weight) -> GpuMatrix:
    """The same bytes."""
    return GpuMatrix(weight.data, weight.format.name.lower(), weight.rows, weight.columns)


def _gpu_layer(layer: LayerWeights) -> GpuLayer:
    gate = layer.shared_gate
    return GpuLayer(
        weights=layer,
        qkv=gpu_matrix(layer.qkv),
        o=gpu_matrix(layer.o),
        mlp=None if layer.mlp is None else (*map(gpu_matrix, layer.mlp),),  # type: ignore[arg-type]
        shared_gate=None if gate is None else gpu_matrix(Weight.of(gate)),
    )


class DecodeStep:
    """The way of B tokens, the newest of as many sequences, through the layers, piece by piece. All methods
    only enqueue work. What a row gives depends on no other row, nor on how many there are."""

    def __init__(self, model: GpuModel, rows: int, like: "DecodeStep | None" = None) -> None:
        """`like`: of no fewer rows; both use its memory, never at the same time."""
        c, self.model, self.rows = model.config, model, rows
        self._memory: dict[str, Tensor] = {} if like is None else like._memory
        moe, experts, top_k = len(model.moe_layers), c.num_experts, c.num_experts_per_tok
        hidden, most_pages, i32 = c.hidden_size, model.pages.most_pages, torch.int32
        kv, heads_width = c.num_key_value_heads * c.head_dim, c.num_attention_heads * c.head_dim
        empty = self._empty
        self.tokens = empty("tokens", rows, dtype=torch.int64)
        self.positions = empty("positions", rows, dtype=i32)
        self.pages = empty("pages", rows, most_pages, dtype=i32)  # of each row's sequence
        self.x = empty("x", rows, hidden)
        self.saved_x = empty("saved_x", moe, rows, hidden)  # at each router
        self.h = empty("h", moe, rows, hidden)  # what the experts of each layer see
        # Of each layer with experts the rows' probabilities, then weights, then ids: one copy to the host.
        self.routing = empty("routing", moe, rows * (experts + 2 * top_k))
        self.slots = empty("slots", moe, rows, top_k, dtype=i32)
        self.table = empty("table", moe, experts, dtype=i32)  # filled before any router reads it
        self.missed = empty("missed", 1, dtype=i32)
        self.guessed = empty("guessed", moe, rows, top_k, dtype=i32)  # of each layer, before it runs
        self.logits = empty("logits", rows, c.vocab_size)
        self._unused = (
            empty("unused h", rows, hidden), empty("unused probabilities", rows, experts),
            empty("unused weights", rows, top_k), empty("unused slots", rows, top_k, dtype=i32),
            empty("unused missed", 1, dtype=i32),
        )  # fmt: skip
        self._qkv = empty("qkv", rows, heads_width + 2 * kv)
        self._q = empty("q", rows, c.num_attention_heads, c.head_dim, dtype=KV_DTYPE)
        self._y = empty("y", rows, heads_width)
        floats = attention_workspace(rows, c.num_attention_heads, c.head_dim, model.pages.context)
        self._attention = empty("attention", floats)
        width = max((m.mlp[0].rows for m in model.layers if m.mlp is not None), default=0)
        empty("gate", rows, width), empty("up", rows, width)  # of the widest layer
        self._down, self._factor = empty("down", rows, hidden), empty("factor", rows, 1)

    def _empty(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Of the memory of that name, which the first step with it has made."""
        if name not in self._memory:
            self._memory[name] = torch.zeros(shape, dtype=dtype, device=self.model.device)
        return self._memory[name].view(-1)[: math.prod(shape)].view(shape)

    def routing_parts(self, routing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a layer, or of several, [..., B (E + 2 K)] -> probabilities [..., B, E], weights [..., B, K],
        ids [..., B, K] int32."""
        n, experts, top_k = self.rows, self.model.config.num_experts, self.model.config.num_experts_per_tok
        begin, end, layers = n * experts, n * (experts + top_k), routing.shape[:-1]
        return (
            routing[..., :begin].view(*layers, n, experts),
            routing[..., begin:end].view(*layers, n, top_k),
            routing[..., end:].view(torch.int32).view(*layers, n, top_k),
        )

    def embed(self) -> None:
        """x of `tokens`."""
        embed_rows(self.model.embedding, self.tokens, self.x, self.missed, NO_MISS)

    def attention(self, index: int, most_keys: int) -> None:
        """x += the attention of layer `index`, of rows that see at most so many keys."""
        m, c, layer = self.model, self.model.config, self.model.layers[index]
        w = layer.weights
        keys, values = m.pages.tensors(index)
        linear(
            self.x, layer.qkv, self._qkv,
            norm=w.input_norm, eps=c.rms_norm_eps, bias=w.qkv_bias, exact=m.exact,
        )  # fmt: skip
        rope_and_store(
            self._qkv, m.cos, m.sin, self.pages, self.positions, keys, values, self._q,
            heads=c.num_attention_heads, kv_heads=c.num_key_value_heads, head_dim=c.head_dim,
            qk_norm=c.family.qk_norm, q_norm=w.q_norm, k_norm=w.k_norm,
            eps=c.rms_norm_eps, clip=c.clip_qkv or 0.0,
        )  # fmt: skip
        attend_rows(
            self._q, keys, values, self.pages, self.positions, c.sliding_windows[index], most_keys,
            self._attention, self._y,
        )  # fmt: skip
        linear(self._y, layer.o, self.x, bias=w.o_bias, residual=True, exact=m.exact)

    def dense_network(self, index: int) -> None:
        """x += the network of a layer without experts."""
        self._mlp(index, self.x, self.model.layers[index].weights.post_attention_norm, None)

    def shared_expert(self, index: int, ordinal: int) -> None:
        """x += the shared expert's gated output, in a layer that has one."""
        layer = self.model.layers[index]
        if layer.shared_gate is not None:
            linear(self.h[ordinal], layer.shared_gate, self._factor, exact=True)
            self._mlp(index, self.h[ordinal], None, torch.sigmoid(self._factor))

    def _mlp(self, index: int, h: Tensor, norm: Tensor | None, factor: Tensor | None) -> None:
        mlp, exact, eps = self.model.layers[index].mlp, self.model.exact, self.model.config.rms_norm_eps
        assert mlp is not None
        gate, up = (self._empty(name, self.rows, mlp[0].rows) for name in ("gate", "up"))
        linear(h, mlp[0], gate, norm=norm, eps=eps, exact=exact)
        linear(h, mlp[1], up, norm=norm, eps=eps, exact=exact)
        hidden = ACTIVATIONS[self.model.config.hidden_act](gate, up)
        linear(hidden, mlp[2], self._down, exact=exact)
        self.x.add_(self._down if factor is None else self._down * factor)

    def router(self, index: int, ordinal: int) -> None:
        """What the experts of layer `index` see, which ones, with which weights, and in which slots."""
        c, w = self.model.config, self.model.layers[index].weights
        assert w.router is not None
        probabilities, weights, ids = self.routing_parts(self.routing[ordinal])
        route(
            self.x, w.post_attention_norm, c.rms_norm_eps, w.router, c.norm_topk_prob, self.table[ordinal],
            self.h[ordinal], probabilities, ids, weights, self.slots[ordinal], self.missed, ordinal,
            saved=self.saved_x[ordinal],
        )  # fmt: skip

    def guess(self, index: int, ordinal: int) -> None:
        """What layer `index`, the next one with experts, will ask for: its own router on x as it is now.

        A layer changes the stream little (Mixtral-offloading, arXiv 2312.17238; Fate, 2502.12224)."""
        c, w = self.model.config, self.model.layers[index].weights
        assert w.router is not None
        h, probabilities, weights, slots, missed = self._unused
        route(
            self.x, w.post_attention_norm, c.rms_norm_eps, w.router, c.norm_topk_prob, self.table[ordinal],
            h, probabilities, self.guessed[ordinal], weights, slots, missed, ordinal,
        )  # fmt: skip

    def output(self) -> None:
        """logits of x."""
        m = self.model
        linear(self.x, m.lm_head, self.logits, norm=m.norm, eps=m.config.rms_norm_eps, exact=m.exact)


# A chunk of tokens


def embed(model: GpuModel, tokens: Tensor) -> Tensor:
    """tokens [T] int64 -> [T, D] fp32."""
    x = torch.empty(len(tokens), model.config.hidden_size, device=model.device)
    embed_rows(model.embedding, tokens, x, torch.empty(1, dtype=torch.int32, device=model.device), NO_MISS)
    return x


def rms_norm(model: GpuModel, x: Tensor, weight: Tensor | None) -> Tensor:
    """Over the last dimension; fp32."""
    return functional.rms_norm(x, (x.shape[-1],), weight, model.config.rms_norm_eps)


def product(x: Tensor, weight: GpuMatrix, exact: bool, bias: Tensor | None = None) -> Tensor:
    """x [T, columns] fp32 -> [T, rows] fp32, multiplied in 16 bits (fp32 if the weights are). Before packed
    weights x is rounded to int8, as on the CPU, if not `exact`."""
    rows = _rows(weight) if weight.format in FLOATS else unpack_matrix(weight, torch.bfloat16)
    if weight.format in BITS and not exact:
        x = round_to_int8(x.contiguous())
    y = functional.linear(x.to(rows.dtype), rows).float()
    return y if bias is None else y.add_(bias)


def chunk_attention(model: GpuModel, index: int, x: Tensor, places: Tensor) -> None:
    """x [T, D] += attention of layer `index`. `places` int64 [B]: where the sequence's keys and values are in
    all pages, those of the chunk's T tokens last, which are written."""
    c, layer = model.config, model.layers[index]
    w, tokens, seen, d = layer.weights, len(x), len(places), model.config.head_dim
    begin = seen - tokens
    qkv = product(rms_norm(model, x, w.input_norm), layer.qkv, model.exact, w.qkv_bias)
    heads, kv = c.num_attention_heads * d, c.num_key_value_heads * d
    q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv], qkv[:, heads + kv :]
    if c.family.qk_norm == "full":
        q, k = rms_norm(model, q, w.q_norm), rms_norm(model, k, w.k_norm)
    if c.clip_qkv:
        q, k, v = (t.clamp(-c.clip_qkv, c.clip_qkv) for t in (q, k, v))
    q, k, v = (t.reshape(tokens, -1, d) for t in (q, k, v))
    if c.family.qk_norm == "head":
        q, k = rms_norm(model, q, w.q_norm), rms_norm(model, k, w.k_norm)
    cos, sin = (t[begin : begin + tokens, None] for t in (model.cos, model.sin))
    new_keys, new_values = _rotate(k, cos, sin).to(KV_DTYPE), v.to(KV_DTYPE)
    keys, values = (pages.view(-1, *pages.shape[2:]) for pages in model.pages.tensors(index))
    keys[places[begin:]], values[places[begin:]] = new_keys, new_values
    if begin:
        new_keys, new_values = keys[places], values[places]
    y = attend_many(_rotate(q, cos, sin).to(KV_DTYPE), new_keys, new_values, c.sliding_windows[index])
    x.add_(product(y.float(), layer.o, model.exact, w.o_bias))


def chunk_router(model: GpuModel, index: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, D] -> h [T, D], probabilities [T, E], weights [T, K], ids [T, K] int32."""
    c, w = model.config, model.layers[index].weights
    assert w.router is not None
    h = rms_norm(model, x, w.post_attention_norm)
    probabilities = functional.linear(h, w.router).softmax(-1)
    weights, ids = probabilities.topk(c.num_experts_per_tok, dim=-1)
    if c.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return h, probabilities, weights, ids.int()


def chunk_network(model: GpuModel, index: int, h: Tensor, x: Tensor) -> None:
    """x [T, D] += the dense network, or the gated shared expert, of h [T, D]; nothing where there is none."""
    layer = model.layers[index]
    if layer.mlp is None:
        return
    gate, up, down = layer.mlp
    hidden = ACTIVATIONS[model.config.hidden_act](product(h, gate, model.exact), product(h, up, model.exact))
    y = product(hidden, down, model.exact)
    x.add_(y if layer.shared_gate is None else y * torch.sigmoid(product(h, layer.shared_gate, True)))


def chunk_logits(model: GpuModel, x: Tensor) -> Tensor:
    """x [T, D] -> [T, V] fp32."""
    return product(rms_norm(model, x, model.norm), model.lm_head, model.exact)


def _rows(matrix: GpuMatrix) -> Tensor:
    return matrix.data.view(FLOATS[matrix.format]).view(matrix.rows, matrix.columns)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, d]; halves are paired as in Hugging Face checkpoints."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin
