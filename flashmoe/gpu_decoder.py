"""The decoder on a GPU, for one sequence: `Decoder`'s counterpart, with experts in VRAM slots.

A chunk of a prompt runs through torch's products layer by layer. One token is a chain of CUDA graphs, cut
behind each layer's router. If every expert has a slot, the chain is one graph and the host is not in the way.
So it is if the GPU can read experts in place, in pinned RAM: what it lacks then is on the drive. The router
leaves a flag where that happens; the host has the drive read, and launches what follows that layer again.

Where experts cannot be read in place (a checkpoint's own bytes are not aligned), or the CPU is to compute
those in RAM, the host reads what each layer was routed to: if all of it is in VRAM it launches what follows
and does its bookkeeping meanwhile; if not, it launches those that are there, fetches the others and launches
the rest. Axis letters: T tokens, D hidden, E experts, K experts per token, V vocabulary.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cache_policies.replay import serving_order
from flashmoe.budget import PREFILL_CHUNK
from flashmoe.decoder import RoutingObserver, Stretch
from flashmoe.errors import GpuError
from flashmoe.gpu_attention import GpuKVCache, bucket_for
from flashmoe.gpu_graphs import Graph, GraphPool, gpu_seconds
from flashmoe.gpu_model import (
    NO_MISS,
    GpuModel,
    OneToken,
    chunk_attention,
    chunk_logits,
    chunk_network,
    chunk_router,
    embed,
    rms_norm,
)
from flashmoe.prefetch import PrefetchSwitch
from flashmoe.vram_cache import MissEvent, VramCache
from kernels.expert_ffn import Addresses, ExpertFFN
from kernels.expert_slots import BITS
from kernels.triton_decode import ExpertDecode
from kernels.triton_moe import ExpertPrefill
from kernels.triton_tiles import round_to_int8

WARM_UP_TOKENS = (1, 5, PREFILL_CHUNK)  # prompts that take different kernels or tiles
# Whole tokens are launched at once while fewer than this share of them lack an expert: a miss wastes half a
# token's computing, which is about three times what waiting for every router costs.
RARE_MISSES, NEWEST = 0.3, 0.1


class GpuDecoder:
    """Appends tokens to the KV cache and returns logits on the CPU. `check` is called before a token, and
    before every layer of a chunk."""

    def __init__(
        self,
        model: GpuModel,
        cache: VramCache,
        decode: ExpertDecode,
        prefill: ExpertPrefill,
        arena: Tensor,
        table: Tensor,
        host_experts: ExpertFFN | None = None,
        prefetcher: PrefetchSwitch | None = None,
        ram_arena: Tensor | None = None,
    ) -> None:
        """`arena` [slots, slot bytes] uint8 on the GPU; `table` [L, E] int32 is `cache`'s own, pinned.
        `ram_arena` likewise in RAM, where experts are read in place."""
        self.config, self.model, self.experts = model.config, model, cache
        self.observer: RoutingObserver | None = None
        self.prefetcher = prefetcher
        self._decode, self._prefill, self.arena, self.table = decode, prefill, arena, table
        self._host_experts, self.ram_arena = host_experts, ram_arena
        self._one = one = OneToken(model)
        self._steps = _Steps(self)
        pin = model.device.type == "cuda"
        self._token = torch.zeros(1, dtype=torch.int64, pin_memory=pin)
        self._position = torch.zeros(1, dtype=torch.int32, pin_memory=pin)
        self._routing = torch.zeros(one.routing.shape, pin_memory=pin)
        self._h = torch.zeros(1, self.config.hidden_size, pin_memory=pin)
        self._missed = torch.zeros(1, dtype=torch.int32, pin_memory=pin)
        self._logits = torch.zeros(1, self.config.vocab_size, pin_memory=pin)
        self._late_slots = torch.zeros(1, self.config.num_experts_per_tok, dtype=torch.int32, pin_memory=pin)
        self._late = torch.zeros_like(self._late_slots, device=model.device)
        self._guessed = torch.zeros(one.guessed.shape, dtype=torch.int32, pin_memory=pin)
        self._probabilities, self._weights, self._ids = one.routing_parts(self._routing)
        self._scores = self._probabilities.numpy()
        self._guessing = False  # in the token under way
        self._rounds = decode.format in BITS and not model.exact  # what experts see of a prompt, to int8
        self._misses = 1.0  # the share of recent tokens that lacked an expert
        self._unreported: _TokenRouting | None = None
        self._routed = torch.cuda.Event() if pin else None  # type: ignore[no-untyped-call]

    def use_cache(
        self, cache: VramCache, prefetcher: PrefetchSwitch | None, ram_arena: Tensor | None
    ) -> None:
        """Go on with another cache, over the same arena and table."""
        self.experts, self.prefetcher, self.ram_arena = cache, prefetcher, ram_arena
        self._misses, self._unreported = 1.0, None
        self._steps.close()
        self._steps = _Steps(self)  # graphs hold the address of the RAM slots before

    @property
    def kv_cache(self) -> GpuKVCache:
        """Which tokens are valid, and how many there may be."""
        return self.model.kv_cache

    @torch.inference_mode()
    def forward(
        self, token_ids: Sequence[int], all_logits: bool = False, check: Callable[[], None] | None = None
    ) -> Tensor:
        """Run T tokens behind those in the KV cache -> logits [V] of the last one, or [T, V] with
        `all_logits`. Those of one token alone are valid until the next call.

        The KV cache counts the tokens only when every layer has run: an exception leaves it as it was.
        """
        tokens = len(token_ids)
        assert self.kv_cache.length + tokens <= self.kv_cache.context, "more tokens than the context holds"
        watchers = [w for w in (self.observer, self.prefetcher) if w is not None]
        for watcher in watchers:
            watcher.forward_begins(token_ids)
        with out_of_memory_named(), self._idle_after_errors():
            if tokens == 1 and not all_logits:
                if check is not None:
                    check()
                logits = self._one_token(token_ids[0])
            else:
                self._report()
                logits = self._chunk(token_ids, all_logits, check)
        for watcher in watchers:
            watcher.forward_ends()
        self.kv_cache.append(list(token_ids))
        return logits

    def forward_batch(
        self, batch: Sequence[Stretch], check: Callable[[], None] | None = None
    ) -> Tensor:
        """New tokens of its one sequence -> logits [1, V]."""
        ((kv_cache, tokens),) = batch
        assert kv_cache is self.kv_cache, "on a GPU there is one sequence"
        return self.forward(tokens, check=check)[None]

    def settle(self) -> None:
        """Tell the policies, and the counters, what they have not been told yet: a token's routing is
        reported while the next one is computed."""
        self._report()

    def close(self) -> None:
        """Give the GPU's memory back; of no use afterwards."""
        self._steps.close()
        del self.arena, self.model, self._one, self._decode, self._prefill

    @contextmanager
    def _idle_after_errors(self) -> Iterator[None]:
        """What goes on after an error may write to, or free, what the GPU still reads."""
        try:
            yield
        except BaseException:
            if self.model.device.type == "cuda":
                torch.cuda.synchronize()
            raise

    def resident_token_s(self, repeat: int = 9) -> float:
        """Seconds that one more token takes the GPU if every expert is in VRAM: for bounds.

        Any slot stands in for an expert that is not; what comes out is of no use, and nothing remembers it.
        """
        position = min(self.kv_cache.length, self.kv_cache.context - 1)
        bucket = bucket_for(position + 1, self.kv_cache.context)
        self._steps.prepare(bucket, True, False)
        layers = range(self.config.num_hidden_layers)
        rows = [tensor[position] for layer in layers for tensor in self.kv_cache.tensors(layer)]
        keys_and_values, table = [row.clone() for row in rows], self.table.clone()
        self._position[0] = position
        try:
            self.table.copy_(torch.arange(table.numel(), dtype=torch.int32).view_as(table) % len(self.arena))
            whole = self._steps.whole(bucket)
            return statistics.median(gpu_seconds(whole.launch) for _ in range(repeat))
        finally:
            self.table.copy_(table)
            for row, kept in zip(rows, keys_and_values, strict=True):
                row.copy_(kept)

    def warm_up(self) -> None:
        """Compile and load every kernel that a chat needs, and capture the graphs of its first tokens."""
        nobody = torch.full((self.config.num_experts,), -1, dtype=torch.int32, device=self.model.device)
        for tokens in (min(n, self.kv_cache.context) for n in WARM_UP_TOKENS):
            x = embed(self.model, torch.zeros(tokens, dtype=torch.int64, device=self.model.device))
            layer = self.model.moe_layers[0]
            chunk_attention(self.model, layer, x)
            h, _, weights, ids = chunk_router(self.model, layer, x)
            self._prefill.run(h, ids, nobody, self.arena, weights)
            self._prefill.combine(weights, torch.zeros_like(x))
        guessing = self.prefetcher is not None
        at_once = self.experts.is_complete or self.experts.in_place
        self._steps.prepare(bucket_for(1, self.kv_cache.context), at_once, guessing)
        if guessing:
            self._steps.prepare(bucket_for(1, self.kv_cache.context), False, False)

    # One token

    def _one_token(self, token: int) -> Tensor:
        position = self.kv_cache.length
        bucket = bucket_for(position + 1, self.kv_cache.context)
        self._token[0], self._position[0] = token, position
        in_place = self.experts.in_place
        at_once = self.experts.is_complete or in_place or self._misses < RARE_MISSES
        self._guessing = not at_once and self.prefetcher is not None and self.prefetcher.is_on
        self._steps.prepare(bucket, at_once, self._guessing)
        if at_once:
            self.experts.commit()
            self._steps.whole(bucket).launch()
            self._mark()
            self._report()  # of the token before, while this one is computed
            self.experts.promote()
            self._wait()
            first = self._first_missed()
            missed = first < len(self.model.moe_layers)
            self._note(token, 0, first)
            if missed and in_place:
                self._rest_at_once(bucket, first, token)
            elif missed:
                self._report()
                self._one.x.copy_(self._one.saved_x[first])
                self._layer_by_layer(bucket, first, token)
        else:
            self._report()
            self._steps.segment(bucket, 0, self._guessing).launch()
            self._mark()
            missed = self._layer_by_layer(bucket, 0, token)
        if not self.experts.is_complete:
            self._misses += NEWEST * (missed - self._misses)
        return self._logits[0]

    def _first_missed(self) -> int:
        """Of what was launched last the first layer with experts that lacked one; or how many there are."""
        return min(int(self._missed[0]), len(self.model.moe_layers))

    def _rest_at_once(self, bucket: int, missed: int, token: int) -> None:
        """The rest of a token that was launched whole, from layer `missed` on, which lacks an expert: when
        the drive has brought it, all that follows is launched again."""
        layers = self.model.moe_layers
        while missed < len(layers):
            self._report()
            ids = self._ids[missed].tolist()
            event = self.experts.fetch(
                layers[missed], ids, self._weights[missed].tolist(), self._scores[missed], token
            )
            event.late()
            self._late_slots[0] = self.table[missed, ids]
            self._steps.late(missed).launch()
            self._steps.rest(bucket, missed).launch()
            self._mark()
            event.settle()
            self._observe(range(missed, missed + 1))
            self._wait()
            begin, missed = missed + 1, self._first_missed()
            self._note(token, begin, missed)

    def _layer_by_layer(self, bucket: int, first: int, token: int) -> bool:
        """The rest of a token whose layer `first` is routed, or being routed. Whether an expert was missing.
        Waits for the logits."""
        missed = False
        for ordinal in range(first, len(self.model.moe_layers)):
            layer = self.model.moe_layers[ordinal]
            self._wait()
            ids = self._ids[ordinal].tolist()
            here = self.experts.all_resident(layer, ids)
            if here:
                self._steps.run(ordinal).launch()
                self._steps.segment(bucket, ordinal + 1, self._guessing).launch()
                self._mark()
            weights, scores = self._weights[ordinal].tolist(), self._scores[ordinal]
            if here:
                self.experts.hit_event(layer, ids, weights, scores, token)
            else:
                missed = True
                event = self._fetch(ordinal, ids, weights, scores, token)
                self._steps.segment(bucket, ordinal + 1, self._guessing).launch()
                self._mark()
                event.settle()  # the policies, while the GPU computes
            if self._guessing and ordinal + 1 < len(self.model.moe_layers):
                assert self.prefetcher is not None
                after, guessed = self.model.moe_layers[ordinal + 1], self._guessed[ordinal + 1, 0].tolist()
                self.experts.prefetch([(after, expert) for expert in guessed], self.prefetcher.at_most)
            self._observe(range(ordinal, ordinal + 1))
        self._wait()
        return missed

    def _fetch(
        self, ordinal: int, ids: list[int], weights: list[float], scores: Sequence[float], token: int
    ) -> MissEvent:
        """A layer's experts, of which some are not in VRAM: launches the products of all of them.

        The next router may read the table before this event is settled, and find an expert that then leaves.
        It is missing for the host all the same: its product is computed again, from where it comes to.
        """
        self._steps.run(ordinal).launch()  # those that are there; the others' slots are -1
        event = self.experts.fetch(self.model.moe_layers[ordinal], ids, weights, scores, token)
        if event.cpu:
            self._compute_on_cpu(event.cpu)
        self._late_slots.fill_(-1)
        for place, slot in event.late():
            self._late_slots[0, place] = slot
        self._steps.late(ordinal).launch()
        return event

    def _compute_on_cpu(self, experts: Sequence[tuple[int, Addresses]]) -> None:
        ffn = self._host_experts
        assert ffn is not None
        ffn.begin(self._h)
        ffn.add_to_one_token(experts)
        for place, _ in experts:
            self._decode.products[place].copy_(ffn.products[place], non_blocking=True)

    def _note(self, token: int, begin: int, end: int) -> None:
        """Layers `begin` to `end` (of those with experts) of a token launched whole had all experts: tell the
        observer, and the policy while the next token is computed."""
        self._observe(range(begin, end))
        if self.experts.is_complete:
            self.experts.counters.hits += (end - begin) * self.config.num_experts_per_tok
        else:
            self._unreported = _TokenRouting(token, begin, self._routing[begin:end].clone())

    def _observe(self, ordinals: range) -> None:
        if self.observer is None:
            return
        for ordinal in ordinals:
            rows, layer = slice(ordinal, ordinal + 1), self.model.moe_layers[ordinal]
            self.observer.routed(layer, self._ids[rows], self._weights[rows], self._probabilities[rows])

    def _report(self) -> None:
        """Tell the policy what an earlier token was routed to."""
        if self._unreported is None:
            return
        token, self._unreported = self._unreported, None
        probabilities, weights, ids = self._one.routing_parts(token.routing)
        layers = self.model.moe_layers[token.begin : token.begin + len(token.routing)]
        scores: Sequence[Sequence[float]] = probabilities.tolist()
        self.experts.hit_events(token.token, layers, ids.tolist(), weights.tolist(), scores)

    def _mark(self) -> None:
        if self._routed is not None:
            self._routed.record()

    def _wait(self) -> None:
        """Until the GPU has done what was marked last."""
        if self._routed is not None:
            self._routed.synchronize()

    # A chunk of a prompt

    def _chunk(
        self, token_ids: Sequence[int], all_logits: bool, check: Callable[[], None] | None
    ) -> Tensor:
        model = self.model
        x = embed(model, torch.tensor(token_ids, device=model.device))
        distinct = torch.zeros(self.config.num_experts, device=model.device)
        ordinal = 0
        for index in range(self.config.num_hidden_layers):
            if check is not None:
                check()
            chunk_attention(model, index, x)
            if not self.config.moe_layers[index]:
                norm = model.layers[index].weights.post_attention_norm
                chunk_network(model, index, rms_norm(model, x, norm), x)
                continue
            h, probabilities, weights, ids = chunk_router(model, index, x)
            if self.observer is not None:
                self.observer.routed(index, ids.cpu(), weights.cpu(), probabilities.cpu())
            seen = round_to_int8(h) if self._rounds else h
            if self.experts.is_complete:
                self._one.table[ordinal].copy_(self.table[ordinal], non_blocking=True)
                self._prefill.run(seen, ids, self._one.table[ordinal], self.arena, weights)
                distinct += torch.zeros_like(distinct).scatter_(0, ids.view(-1).long(), 1.0)
            else:
                self._stream(index, seen, ids, weights, probabilities, token_ids)
            self._prefill.combine(weights, x)
            chunk_network(model, index, h, x)
            ordinal += 1
        if all_logits:
            logits = chunk_logits(model, x).cpu()
        else:
            self._one.x.copy_(x[-1:])
            self._one.output()
            logits = self._one.logits[0].cpu()
        self.experts.counters.hits += int(distinct.sum())
        return logits

    def _stream(
        self, index: int, h: Tensor, ids: Tensor, weights: Tensor, probabilities: Tensor,
        token_ids: Sequence[int],
    ) -> None:  # fmt: skip
        """Products of a chunk's experts, group by group as they are in VRAM."""
        on_host = ids.cpu()
        self.experts.observe(
            index, on_host.tolist(), weights.cpu().tolist(), probabilities.cpu().numpy(), token_ids
        )
        for group in self.experts.stream(index, serving_order(on_host.numpy())):
            table = torch.full((self.config.num_experts,), -1, dtype=torch.int32)
            for expert, slot in group:
                table[expert] = slot
            self._prefill.run(h, ids, table.to(h.device, non_blocking=True), self.arena, weights)


@contextmanager
def out_of_memory_named() -> Iterator[None]:
    """Turn a GPU that has no memory left, in mid-run, into a GpuError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise GpuError(
            "the GPU has no memory left within --vram-budget; leave it to this process, or try a smaller"
            " --context or another --vram-budget"
        ) from error


class _TokenRouting(NamedTuple):
    """What a token's layers from `begin` on were routed to: rows as in `OneToken.routing`."""

    token: int
    begin: int  # of the layers with experts
    routing: Tensor


class _Steps:
    """One token's graphs, each captured once."""

    def __init__(self, decoder: GpuDecoder) -> None:
        self._decoder, self._pool = decoder, GraphPool(decoder.model.device)
        self._segments = decoder.model.segments()
        self._graphs: dict[tuple[str, int, int], Graph] = {}

    def close(self) -> None:
        """Give the graphs up."""
        self._graphs.clear()

    def prepare(self, bucket: int, at_once: bool, guessing: bool) -> None:
        """Capture what a token may need. Not while one is under way: what is captured runs once."""
        last = len(self._segments) - 1
        if at_once:
            self.whole(bucket)
        cache = self._decoder.experts
        if cache.in_place and cache.needs_drive:
            for ordinal in range(last):
                self.rest(bucket, ordinal)
                self.late(ordinal)
        if not (cache.is_complete or cache.in_place):
            for ordinal in range(last + 1):
                self.segment(bucket, ordinal, guessing)
                if ordinal < last:
                    self.run(ordinal)
                    self.late(ordinal)

    def whole(self, bucket: int) -> Graph:
        """The whole token, which sees the first `bucket` keys."""
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
        """Those that have come since, by the decoder's list of slots."""
        return self._graph("late", 0, ordinal, partial(self._late, ordinal), warm_up=False)

    def _graph(
        self, what: str, bucket: int, ordinal: int, work: Callable[[], None], warm_up: bool = True
    ) -> Graph:
        key = (what, bucket, ordinal)
        if key not in self._graphs:
            self._graphs[key] = Graph(work, self._decoder.model.device, self._pool, warm_up)
        return self._graphs[key]

    def _whole(self, bucket: int) -> None:
        self._decoder._one.table.copy_(self._decoder.table, non_blocking=True)
        self._compute_from(bucket, 0)

    def _rest(self, bucket: int, ordinal: int) -> None:
        one = self._decoder._one
        one.table.copy_(self._decoder.table, non_blocking=True)
        one.missed.fill_(NO_MISS)
        one.x.copy_(one.saved_x[ordinal])
        self._compute_from(bucket, ordinal + 1)

    def _compute_from(self, bucket: int, first: int) -> None:
        d, one, last = self._decoder, self._decoder._one, len(self._segments) - 1
        for ordinal in range(first, last + 1):
            self._compute_segment(bucket, ordinal)
            if ordinal < last:
                self._run(ordinal)
        d._missed.copy_(one.missed, non_blocking=True)
        d._routing.copy_(one.routing, non_blocking=True)
        d._logits.copy_(one.logits, non_blocking=True)

    def _segment(self, bucket: int, ordinal: int, guessing: bool) -> None:
        d, one = self._decoder, self._decoder._one
        if ordinal < len(self._segments) - 1:
            one.table[ordinal].copy_(d.table[ordinal], non_blocking=True)
            self._compute_segment(bucket, ordinal)
            d._routing[ordinal].copy_(one.routing[ordinal], non_blocking=True)
            if d._host_experts is not None:
                d._h.copy_(one.h[ordinal], non_blocking=True)
            after = ordinal + 1
            if guessing and after < len(d.model.moe_layers):
                one.guess(d.model.moe_layers[after], after)
                d._guessed[after].copy_(one.guessed[after], non_blocking=True)
        else:
            self._compute_segment(bucket, ordinal)
            d._logits.copy_(one.logits, non_blocking=True)

    def _compute_segment(self, bucket: int, ordinal: int) -> None:
        d, one = self._decoder, self._decoder._one
        if ordinal == 0:
            one.token.copy_(d._token, non_blocking=True)
            one.position.copy_(d._position, non_blocking=True)
            one.embed(bucket)
        else:
            before = ordinal - 1
            d._decode.combine(one.routing_parts(one.routing[before : before + 1])[1], one.x)
            one.shared_expert(d.model.moe_layers[before], before)
        last = ordinal == len(self._segments) - 1
        for index in self._segments[ordinal]:
            one.attention(index, bucket)
            if not d.config.moe_layers[index]:
                one.dense_network(index)
        if last:
            one.output()
        else:
            one.router(self._segments[ordinal][-1], ordinal)

    def _run(self, ordinal: int) -> None:
        one = self._decoder._one
        d = self._decoder
        d._decode.run(one.h[ordinal], one.slots[ordinal], d.arena, d.ram_arena)

    def _late(self, ordinal: int) -> None:
        d = self._decoder
        d._late.copy_(d._late_slots, non_blocking=True)
        d._decode.run(d._one.h[ordinal], d._late, d.arena, d.ram_arena)
