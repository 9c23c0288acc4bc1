"""Steps of B tokens on a GPU as CUDA graphs: what the host hands over and gets back, and every piece of a
step, captured once.

A piece ends where the host may have to look: behind a layer's router. Axis letters: B rows, each the newest
token of a sequence, D hidden, E experts, K experts per token, V vocabulary, L layers with experts.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from flashmoe.decoder import Stretch
from flashmoe.gpu_graphs import Graph, GraphPool
from flashmoe.gpu_model import NO_MISS, DecodeStep, GpuModel
from kernels.triton_decode import ExpertDecode


class StepExperts(NamedTuple):
    """Where a step's experts are: VRAM slots `arena` [slots, bytes] uint8, the cache's pinned `table` [L, E]
    int32, and the RAM slots where they are read in place. `h_to_host`: what experts see, for the CPU's."""

    decode: ExpertDecode
    arena: Tensor
    table: Tensor
    ram_arena: Tensor | None
    h_to_host: bool


class Steps:
    """Those of so many rows."""

    def __init__(
        self, model: GpuModel, experts: StepExperts, graphs: GraphPool, rows: int, like: "Steps | None" = None
    ) -> None:
        """`like`: of no fewer rows, whose memory this uses too; only one of them runs at a time."""
        self.rows, self._model, self._experts = rows, model, experts
        self.on_gpu: DecodeStep = DecodeStep(model, rows, None if like is None else like.on_gpu)
        self._segments, self._graph_pool = model.segments(), graphs
        self.missed = 1.0  # the share of recent steps that lacked an expert
        self._graphs: dict[tuple[str, int, int], Graph] = {}
        self.bucket = 0  # keys that the graphs are captured for
        self._memory: dict[str, Tensor] = {} if like is None else like._memory
        gpu, pinned = self.on_gpu, self._pinned
        self._tokens, self._positions = pinned(gpu.tokens, "tokens"), pinned(gpu.positions, "positions")
        self._pages, self._missed = pinned(gpu.pages, "pages"), pinned(gpu.missed, "missed")
        self._routing, self.guessed = pinned(gpu.routing, "routing"), pinned(gpu.guessed, "guessed")
        self.h, self.logits = pinned(gpu.h[0], "h"), pinned(gpu.logits, "logits")  # [B, D], [B, V]
        self.late_slots = pinned(gpu.slots[0], "late")  # [B, K]
        self._late = torch.zeros_like(gpu.slots[0])
        self.probabilities, self.weights, self.ids = gpu.routing_parts(self._routing)  # [L, B, ...]
        self.scores = self.probabilities.numpy()
        self._done = torch.cuda.Event() if model.device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def begin(self, batch: Sequence[Stretch]) -> None:
        """Hand over a token of each sequence."""
        for row, (kv_cache, tokens) in enumerate(batch):
            self._tokens[row], self._positions[row] = tokens[0], kv_cache.length
            self._pages[row, : len(kv_cache.pages)] = torch.tensor(kv_cache.pages, dtype=torch.int32)

    def first_missed(self) -> int:
        """Of what was launched last the first layer with experts that lacked one; or how many there are."""
        return min(int(self._missed[0]), len(self._model.moe_layers))

    def routing(self, begin: int, end: int) -> Tensor:
        """A copy of what layers `begin` to `end` (of those with experts) were routed to; see `parts_of`."""
        return self._routing[begin:end].clone()

    def parts_of(self, routing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities, weights and ids, as in `DecodeStep.routing_parts`."""
        return self.on_gpu.routing_parts(routing)

    def again_from(self, ordinal: int) -> None:
        """Go back to the router of layer `ordinal` (of those with experts)."""
        self.on_gpu.x.copy_(self.on_gpu.saved_x[ordinal])

    def mark(self) -> None:
        """What `wait` waits for."""
        if self._done is not None:
            self._done.record()

    def wait(self) -> None:
        """Until the GPU has done what was marked last."""
        if self._done is not None:
            self._done.synchronize()

    def close(self) -> None:
        """Give the graphs up."""
        self._graphs.clear()

    # The graphs

    def prepare(self, bucket: int, at_once: bool, layer_by_layer: bool, rest: bool, guessing: bool) -> None:
        """Capture what a step may need, and give up what is of another bucket: a graph is 0.14 MB of the GPU
        outside torch's, and layer by layer there are three a layer. Not while a step is under way: what is
        captured runs once."""
        last = len(self._segments) - 1
        if at_once:
            self.whole(bucket)
        if rest:
            for ordinal in range(last):
                self.rest(bucket, ordinal)
        if layer_by_layer:
            for ordinal in range(last + 1):
                self.segment(bucket, ordinal, guessing)
                if ordinal < last:
                    self.run(ordinal)
        if rest or layer_by_layer:
            for ordinal in range(last):
                self.late(ordinal)
        if bucket != self.bucket:  # now that there are others: torch gives up a pool without any
            self.bucket = bucket
            self._graphs = {key: graph for key, graph in self._graphs.items() if key[1] in (0, bucket)}

    def whole(self, bucket: int) -> Graph:
        """The whole step, whose rows see at most `bucket` keys."""
        return self._graph("whole", bucket, 0, partial(self._whole, bucket))

    def rest(self, bucket: int, ordinal: int) -> Graph:
        """What follows the experts of layer `ordinal`, whose products are there."""
        work = partial(self._rest, bucket, ordinal)
        return self._graph("rest", bucket, ordinal, work, warm_up=False)  # in mid-token: not to run twice

    def segment(self, bucket: int, ordinal: int, guessing: bool) -> Graph:
        """From the experts' sum before layer `ordinal` (of those with experts) to its router, or to the
        logits. `guessing`: what the next layer will ask for, too."""
        what = "guessing segment" if guessing else "segment"
        return self._graph(what, bucket, ordinal, partial(self._segment, bucket, ordinal, guessing))

    def run(self, ordinal: int) -> Graph:
        """The experts of layer `ordinal` that the router found in VRAM."""
        return self._graph("run", 0, ordinal, partial(self._run, ordinal))

    def late(self, ordinal: int) -> Graph:
        """Those that have come since, by `late_slots`."""
        return self._graph("late", 0, ordinal, partial(self._run_late, ordinal), warm_up=False)

    def _graph(
        self, what: str, bucket: int, ordinal: int, work: Callable[[], None], warm_up: bool = True
    ) -> Graph:
        key = (what, bucket, ordinal)
        if key not in self._graphs:
            self._graphs[key] = Graph(work, self._model.device, self._graph_pool, warm_up)
        return self._graphs[key]

    def _whole(self, bucket: int) -> None:
        self.on_gpu.table.copy_(self._experts.table, non_blocking=True)
        self._compute_from(bucket, 0)

    def _rest(self, bucket: int, ordinal: int) -> None:
        gpu = self.on_gpu
        gpu.table.copy_(self._experts.table, non_blocking=True)
        gpu.missed.fill_(NO_MISS)
        gpu.x.copy_(gpu.saved_x[ordinal])
        self._compute_from(bucket, ordinal + 1)

    def _compute_from(self, bucket: int, first: int) -> None:
        gpu, last = self.on_gpu, len(self._segments) - 1
        for ordinal in range(first, last + 1):
            self._compute_segment(bucket, ordinal)
            if ordinal < last:
                self._run(ordinal)
        self._missed.copy_(gpu.missed, non_blocking=True)
        self._routing.copy_(gpu.routing, non_blocking=True)
        self.logits.copy_(gpu.logits, non_blocking=True)

    def _segment(self, bucket: int, ordinal: int, guessing: bool) -> None:
        gpu = self.on_gpu
        if ordinal < len(self._segments) - 1:
            gpu.table[ordinal].copy_(self._experts.table[ordinal], non_blocking=True)
            self._compute_segment(bucket, ordinal)
            self._routing[ordinal].copy_(gpu.routing[ordinal], non_blocking=True)
            if self._experts.h_to_host:
                self.h.copy_(gpu.h[ordinal], non_blocking=True)
            after = ordinal + 1
            if guessing and after < len(self._model.moe_layers):
                gpu.guess(self._model.moe_layers[after], after)
                self.guessed[after].copy_(gpu.guessed[after], non_blocking=True)
        else:
            self._compute_segment(bucket, ordinal)
            self.logits.copy_(gpu.logits, non_blocking=True)

    def _compute_segment(self, bucket: int, ordinal: int) -> None:
        gpu = self.on_gpu
        if ordinal == 0:
            gpu.tokens.copy_(self._tokens, non_blocking=True)
            gpu.positions.copy_(self._positions, non_blocking=True)
            gpu.pages.copy_(self._pages, non_blocking=True)
            gpu.embed()
        else:
            before = ordinal - 1
            self._experts.decode.combine(gpu.routing_parts(gpu.routing[before])[1], gpu.x)
            gpu.shared_expert(self._model.moe_layers[before], before)
        for index in self._segments[ordinal]:
            gpu.attention(index, bucket)
            if not self._model.config.moe_layers[index]:
                gpu.dense_network(index)
        if ordinal == len(self._segments) - 1:
            gpu.output()
        else:
            gpu.router(self._segments[ordinal][-1], ordinal)

    def _run(self, ordinal: int) -> None:
        self.run_slots(ordinal, self.on_gpu.slots[ordinal])

    def _run_late(self, ordinal: int) -> None:
        self._late.copy_(self.late_slots, non_blocking=True)
        self.run_slots(ordinal, self._late)

    def run_slots(self, ordinal: int, slots: Tensor) -> None:
        """Products of those of layer `ordinal` whose slot is not -1; slots [B, K] int32 on the GPU."""
        e = self._experts
        e.decode.run(self.on_gpu.h[ordinal], slots, e.arena, e.ram_arena)

    def _pinned(self, like: Tensor, name: str) -> Tensor:
        """On the host, of the memory of that name, which the first steps with it have made."""
        if name not in self._memory:
            pin = self._model.device.type == "cuda"
            self._memory[name] = torch.zeros(like.shape, dtype=like.dtype, pin_memory=pin)
        return self._memory[name].view(-1)[: math.prod(like.shape)].view(like.shape)
