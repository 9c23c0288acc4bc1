"""The decoder on a GPU: `Decoder`'s counterpart, with experts in VRAM slots.

A chunk of a prompt runs through torch's products layer by layer. A step, one token of each of up to MOST_ROWS
sequences, is a chain of CUDA graphs, cut behind each layer's router. If every expert has a slot, the chain is
one graph and the host is not in the way. So it is if the GPU can read experts in place, in pinned RAM: what
it lacks then is on the drive. The router leaves a flag where that happens; the host has the drive read, and
launches what follows that layer again.

Where experts cannot be read in place (a checkpoint's own bytes are not aligned), or the CPU is to compute
those in RAM, the host reads what each layer was routed to: if all of it is in VRAM it launches what follows
and does its bookkeeping meanwhile; if not, it launches those that are there, fetches the others and launches
the rest. Of several sequences a layer that lacks an expert is served as a chunk's is: experts come in groups.

What a sequence's tokens give depends on no other sequence: every row of a step has the bits that it has
alone, and chunks run one by one. Axis letters: T tokens, B rows, D hidden, E experts, K experts per token,
V vocabulary.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from cache_policies.replay import serving_order
from flashmoe.budget import PREFILL_CHUNK
from flashmoe.decoder import RoutingObserver, Stretch
from flashmoe.errors import FlashMoEError
from flashmoe.gpu_attention import bucket_for
from flashmoe.gpu_graphs import GraphPool, gpu_seconds, out_of_memory_named
from flashmoe.gpu_kv_cache import GpuKVCache
from flashmoe.gpu_model import (
    GpuModel,
    chunk_attention,
    chunk_logits,
    chunk_network,
    chunk_router,
    embed,
    rms_norm,
)
from flashmoe.gpu_steps import StepExperts, Steps
from flashmoe.kv_cache import BLOCK
from flashmoe.prefetch import PrefetchSwitch
from flashmoe.vram_cache import MissEvent, VramCache
from kernels.expert_ffn import Addresses, ExpertFFN
from kernels.expert_slots import BITS
from kernels.triton_decode import MOST_TOKENS, ExpertDecode
from kernels.triton_moe import ExpertPrefill
from kernels.triton_tiles import round_to_int8

MOST_ROWS = MOST_TOKENS  # of a step; more sequences take several
WARM_UP_TOKENS = (1, 5, PREFILL_CHUNK)  # prompts that take different kernels or tiles
# Whole steps are launched at once while fewer than this share of them lack an expert: a miss wastes half a
# step's computing, which is about three times what waiting for every router costs.
RARE_MISSES, NEWEST = 0.3, 0.1


class GpuDecoder:
    """Appends tokens to KV caches and returns logits on the CPU. `check` is called before a step, and before
    every layer of a chunk. `kv_cache` is a sequence of its own."""

    runs_prompts_together = False  # a chunk's bits would depend on it

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
        most_rows: int = 1,
    ) -> None:
        """`arena` [slots, slot bytes] uint8 on the GPU; `table` [L, E] int32 is `cache`'s own, pinned.
        `ram_arena` likewise in RAM, where experts are read in place. `most_rows`: that a step has."""
        assert most_rows <= MOST_ROWS
        self.config, self.model, self.experts = model.config, model, cache
        self.observer: RoutingObserver | None = None
        self.prefetcher = prefetcher
        self.kv_cache = model.pages.lender = GpuKVCache(model.pages)
        self.make_room: Callable[[], bool] | None = None  # for it: whether another has given pages up
        self._decode, self._prefill, self.arena, self.table = decode, prefill, arena, table
        self._host_experts, self.ram_arena, self._most_rows = host_experts, ram_arena, most_rows
        self._graphs = GraphPool(model.device)
        self._open_steps()
        self._guessing = False  # in the step under way
        self._rounds = decode.format in BITS and not model.exact  # what experts see of a prompt, to int8
        self._unreported: _StepRouting | None = None

    def use_cache(
        self, cache: VramCache, prefetcher: PrefetchSwitch | None, ram_arena: Tensor | None
    ) -> None:
        """Go on with another cache, over the same arena and table."""
        self.experts, self.prefetcher, self.ram_arena = cache, prefetcher, ram_arena
        self._unreported = None
        self._close_steps()
        del self._largest
        self._graphs = GraphPool(self.model.device)  # without graphs the one before is of no use to torch
        self._open_steps()  # graphs hold the address of the RAM slots before

    def _open_steps(self) -> None:
        self._step_experts = StepExperts(
            self._decode, self.arena, self.table, self.ram_arena, self._host_experts is not None
        )
        self._largest = Steps(self.model, self._step_experts, self._graphs, self._most_rows)
        self._steps = {self._most_rows: self._largest}

    def _close_steps(self) -> None:
        for steps in self._steps.values():
            steps.close()
        self._steps.clear()

    def _steps_of(self, rows: int) -> Steps:
        if rows not in self._steps:
            self._steps[rows] = Steps(self.model, self._step_experts, self._graphs, rows, self._largest)
        return self._steps[rows]

    def new_sequence(self) -> GpuKVCache:
        """Another one; it has no memory yet."""
        return GpuKVCache(self.model.pages)

    def _claim(self, length: int) -> None:
        """Memory for its own sequence."""
        lacking = -(-length // BLOCK) - len(self.kv_cache.pages)
        while lacking > self.model.pages.free and self.make_room is not None:
            if not self.make_room():
                raise FlashMoEError("generations that run have the GPU's KV cache; let them finish first")
        self.kv_cache.claim(length)

    @torch.inference_mode()
    def forward(
        self, token_ids: Sequence[int], all_logits: bool = False, check: Callable[[], None] | None = None
    ) -> Tensor:
        """Run T tokens behind those in its own KV cache -> logits [V] of the last one, or [T, V] with
        `all_logits`. Those of one token alone are valid until the next call.

        The KV cache counts the tokens only when every layer has run: an exception leaves it as it was.
        """
        tokens = list(token_ids)
        self._claim(self.kv_cache.length + len(tokens))
        if len(tokens) == 1 and not all_logits:
            return self._step([Stretch(self.kv_cache, tokens)], check)[0]
        return self._chunk(Stretch(self.kv_cache, tokens), all_logits, check)

    @torch.inference_mode()
    def forward_batch(
        self, batch: Sequence[Stretch], check: Callable[[], None] | None = None
    ) -> Tensor:
        """Run new tokens of B sequences, for which they have memory -> logits [B, V] of each one's last.

        Sequences of several tokens run one by one, then the others together. A KV cache counts its tokens
        when every layer has run for them.
        """
        if len(batch) <= self._most_rows and all(len(stretch.tokens) == 1 for stretch in batch):
            return self._step(batch, check)
        logits = torch.empty(len(batch), self.config.vocab_size)
        single = [i for i, stretch in enumerate(batch) if len(stretch.tokens) == 1]
        for i, stretch in enumerate(batch):
            if i not in single:
                logits[i] = self._chunk(stretch, False, check)
        for begin in range(0, len(single), self._most_rows):
            rows = single[begin : begin + self._most_rows]
            logits[rows] = self._step([batch[i] for i in rows], check)
        return logits

    @contextmanager
    def _pass(self, batch: Sequence[Stretch]) -> Iterator[None]:
        """What a chunk and a step have around them."""
        token_ids = [token for stretch in batch for token in stretch.tokens]
        for kv_cache, tokens in batch:
            length = kv_cache.length + len(tokens)
            assert length <= kv_cache.context, "more tokens than the context holds"
            assert length <= BLOCK * len(kv_cache.pages), "keys and values would be another sequence's"
        watchers = [w for w in (self.observer, self.prefetcher) if w is not None]
        for watcher in watchers:
            watcher.forward_begins(token_ids)
        with out_of_memory_named(), self._idle_after_errors():
            yield
        for watcher in watchers:
            watcher.forward_ends()
        for kv_cache, tokens in batch:
            kv_cache.append(tokens)

    def settle(self) -> None:
        """Tell the policies, and the counters, what they have not been told yet: a token's routing is
        reported while the next one is computed."""
        self._report()

    def close(self) -> None:
        """Give the GPU's memory back; of no use afterwards."""
        self._close_steps()
        self._unreported = None
        self.model.pages.close()
        del self.arena, self.model, self._decode, self._prefill
        del self._largest, self._step_experts, self._graphs

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
        self._claim(position + 1)
        steps, table = self._steps_of(1), self.table
        bucket = max(steps.bucket, bucket_for(position + 1, self.kv_cache.context))
        steps.begin([Stretch(_At(position, self.kv_cache.pages), [0])])
        steps.prepare(bucket, True, False, False, False)
        place = self.kv_cache.rows(position + 1)[-1]
        layers = range(self.config.num_hidden_layers)
        pages = [tensor for layer in layers for tensor in self.model.pages.tensors(layer)]
        rows = [tensor.view(-1, *tensor.shape[2:])[place] for tensor in pages]
        keys_and_values, slots = [row.clone() for row in rows], table.clone()
        try:
            table.copy_(torch.arange(table.numel(), dtype=torch.int32).view_as(table) % len(self.arena))
            whole = steps.whole(bucket)
            return statistics.median(gpu_seconds(whole.launch) for _ in range(repeat))
        finally:
            table.copy_(slots)
            for row, kept in zip(rows, keys_and_values, strict=True):
                row.copy_(kept)

    def warm_up(self) -> None:
        """Compile and load every kernel that a chat needs, and capture the graphs of its first tokens."""
        nobody = torch.full((self.config.num_experts,), -1, dtype=torch.int32, device=self.model.device)
        self._claim(min(PREFILL_CHUNK, self.kv_cache.context))
        for tokens in (min(n, self.kv_cache.context) for n in WARM_UP_TOKENS):
            x = embed(self.model, torch.zeros(tokens, dtype=torch.int64, device=self.model.device))
            layer = self.model.moe_layers[0]
            chunk_attention(self.model, layer, x, self.kv_cache.rows(tokens))
            h, _, weights, ids = chunk_router(self.model, layer, x)
            self._prefill.run(h, ids, nobody, self.arena, weights)
            self._prefill.combine(weights, torch.zeros_like(x))
        bucket, one = bucket_for(1, self.kv_cache.context), self._steps_of(1)
        self._prepare(one, bucket)
        self._guessing = self.prefetcher is not None
        self._prepare(one, bucket)
        self._guessing = False
        for rows in range(2, self._most_rows + 1):
            if not self._needs_layers(self._steps_of(rows)):  # else these are many graphs, and can wait
                self._prepare(self._steps_of(rows), bucket)
        self.kv_cache.give_back(0)

    # A token of each of several sequences

    def _step(self, batch: Sequence[Stretch], check: Callable[[], None] | None) -> Tensor:
        """-> logits [B, V], valid until the next step."""
        if check is not None:
            check()
        steps = self._steps_of(len(batch))
        with self._pass(batch):
            longest = max(kv_cache.length for kv_cache, _ in batch) + 1
            bucket = max(steps.bucket, bucket_for(longest, self.kv_cache.context))
            self._run_step(steps, bucket, batch)
        return steps.logits

    def _needs_layers(self, steps: Steps) -> bool:
        """Whether the host may have to look at what each layer was routed to. Of one row that lacks what is
        on the drive, all that follows is launched again instead; several lack something too often."""
        cache = self.experts
        return not cache.is_complete and not (cache.in_place and (steps.rows == 1 or not cache.needs_drive))

    def _at_once(self, steps: Steps) -> bool:
        """Whether a step is launched whole."""
        return not self._needs_layers(steps) or steps.missed < RARE_MISSES

    def _prepare(self, steps: Steps, bucket: int) -> bool:
        """Capture what a step may need -> `_at_once`."""
        layers, at_once, cache = self._needs_layers(steps), self._at_once(steps), self.experts
        rest = cache.in_place and cache.needs_drive and not layers
        steps.prepare(bucket, at_once, layers, rest, self._guessing)
        return at_once

    def _run_step(self, steps: Steps, bucket: int, batch: Sequence[Stretch]) -> None:
        tokens = [stretch.tokens[0] for stretch in batch]
        steps.begin(batch)
        guessing = self.prefetcher is not None and self.prefetcher.is_on and steps.rows == 1
        self._guessing = guessing and not self._at_once(steps)
        at_once = self._prepare(steps, bucket)
        self.experts.commit()
        first = steps.whole(bucket) if at_once else steps.segment(bucket, 0, self._guessing)
        first.launch()
        steps.mark()
        self._report()  # of the step before, while this one is computed
        self.experts.promote()
        if at_once:
            steps.wait()
            layer = steps.first_missed()
            self._note(steps, tokens, 0, layer)
            missed = layer < len(self.model.moe_layers)
            if missed:
                self._go_on_from(steps, bucket, layer, tokens)
        else:
            missed = self._layer_by_layer(steps, bucket, 0, tokens)
        steps.missed += NEWEST * (missed - steps.missed)

    def _go_on_from(self, steps: Steps, bucket: int, layer: int, tokens: list[int]) -> None:
        """A step that was launched whole lacked an expert in `layer`, counted among those with experts."""
        self._report()
        if self._needs_layers(steps):
            steps.again_from(layer)
            self._layer_by_layer(steps, bucket, layer, tokens)
        else:
            self._rest_at_once(steps, bucket, layer, tokens)

    def _rest_at_once(self, steps: Steps, bucket: int, missed: int, tokens: list[int]) -> None:
        """The rest of a step that was launched whole, from layer `missed` on, which lacks an expert: when
        the drive has brought it, all that follows is launched again."""
        while missed < len(self.model.moe_layers):
            self._report()
            event = self._fetch_in_place(steps, missed, tokens)
            steps.rest(bucket, missed).launch()
            steps.mark()
            if event is not None:
                event.settle()
            self._observe(steps, range(missed, missed + 1))
            steps.wait()
            begin, missed = missed + 1, steps.first_missed()
            self._note(steps, tokens, begin, missed)

    def _layer_by_layer(self, steps: Steps, bucket: int, first: int, tokens: list[int]) -> bool:
        """The rest of a step whose layer `first` is routed, or being routed. Whether an expert was missing.
        Waits for the logits."""
        missed = False
        for ordinal in range(first, len(self.model.moe_layers)):
            layer = self.model.moe_layers[ordinal]
            steps.wait()
            ids, event = steps.ids[ordinal].tolist(), None
            here = all(self.experts.all_resident(layer, of_row) for of_row in ids)
            if here:
                steps.run(ordinal).launch()
            elif self.experts.in_place:
                event = self._fetch_in_place(steps, ordinal, tokens)
            elif steps.rows == 1:
                event = self._fetch(steps, ordinal, tokens[0])
            else:
                self._serve_together(steps, ordinal, tokens)
            steps.segment(bucket, ordinal + 1, self._guessing).launch()
            steps.mark()
            if here:
                for row, token in enumerate(tokens):
                    weights, scores = steps.weights[ordinal, row].tolist(), steps.scores[ordinal, row]
                    self.experts.hit_event(layer, ids[row], weights, scores, token)
            elif event is not None:
                event.settle()  # the policies, while the GPU computes
            missed |= not here
            if self._guessing and ordinal + 1 < len(self.model.moe_layers):
                assert self.prefetcher is not None
                after, guessed = self.model.moe_layers[ordinal + 1], steps.guessed[ordinal + 1, 0].tolist()
                self.experts.prefetch([(after, expert) for expert in guessed], self.prefetcher.at_most)
            self._observe(steps, range(ordinal, ordinal + 1))
        steps.wait()
        return missed

    def _fetch(self, steps: Steps, ordinal: int, token: int) -> MissEvent:
        """One token's experts of a layer, of which some are not in VRAM: launches the products of all.

        The next router may read the table before this event is settled, and find an expert that then leaves.
        It is missing for the host all the same: its product is computed again, from where it comes to.
        """
        ids, weights = steps.ids[ordinal, 0].tolist(), steps.weights[ordinal, 0].tolist()
        steps.run(ordinal).launch()  # those that are there; the others' slots are -1
        event = self.experts.fetch(
            self.model.moe_layers[ordinal], ids, weights, steps.scores[ordinal, 0], token
        )
        if event.cpu:
            self._compute_on_cpu(steps, event.cpu)
        steps.late_slots.fill_(-1)
        for place, slot in event.late():
            steps.late_slots[0, place] = slot
        steps.late(ordinal).launch()
        return event

    def _fetch_in_place(self, steps: Steps, ordinal: int, tokens: list[int]) -> MissEvent | None:
        """A layer's experts, of which some are on the drive: launches the products of all, when they are in
        RAM. None: they came otherwise, and nothing is left to settle."""
        ids, layer = steps.ids[ordinal], self.model.moe_layers[ordinal]
        routed, weights, scores = ids.tolist(), steps.weights[ordinal].tolist(), steps.scores[ordinal]
        if steps.rows == 1:
            event = self.experts.fetch(layer, routed[0], weights[0], scores[0], tokens[0])
        else:
            experts = serving_order(ids.numpy())
            if not self.experts.can_fetch_together(len(experts)):
                self._serve_together(steps, ordinal, tokens)
                return None
            seen = list(zip(routed, weights, scores, tokens, strict=True))
            event = self.experts.fetch_together(layer, experts, seen)
        event.late()
        steps.late_slots.copy_(self.table[ordinal][ids.long()])
        steps.late(ordinal).launch()
        return event

    def _compute_on_cpu(self, steps: Steps, experts: Sequence[tuple[int, Addresses]]) -> None:
        ffn = self._host_experts
        assert ffn is not None
        ffn.begin(steps.h)
        ffn.add_to_one_token(experts)
        for place, _ in experts:
            self._decode.products[place].copy_(ffn.products[place], non_blocking=True)

    def _serve_together(self, steps: Steps, ordinal: int, tokens: list[int]) -> None:
        """A layer of several sequences' tokens, of whose experts some are not in VRAM: launches the products
        of all, group by group as they come."""
        layer, ids = self.model.moe_layers[ordinal], steps.ids[ordinal]
        routed, weights = ids.tolist(), steps.weights[ordinal].tolist()
        self.experts.observe(layer, routed, weights, steps.scores[ordinal], tokens)
        for group in self.experts.stream(layer, serving_order(ids.numpy())):
            slots = self._table_of(group)[ids.long()]
            steps.run_slots(ordinal, slots.to(self.model.device, non_blocking=True))

    def _table_of(self, group: Sequence[tuple[int, int]]) -> Tensor:
        """int32 [E]: the slots of some experts, of all others -1."""
        table = torch.full((self.config.num_experts,), -1, dtype=torch.int32)
        for expert, slot in group:
            table[expert] = slot
        return table

    def _note(self, steps: Steps, tokens: list[int], begin: int, end: int) -> None:
        """Layers `begin` to `end` (of those with experts) of a step launched whole had all experts: tell the
        observer, and the policy while the next step is computed."""
        self._observe(steps, range(begin, end))
        if self.experts.is_complete:
            self.experts.counters.hits += (end - begin) * self.config.num_experts_per_tok * len(tokens)
        else:
            self._unreported = _StepRouting(steps, tokens, begin, steps.routing(begin, end))

    def _observe(self, steps: Steps, ordinals: range) -> None:
        if self.observer is None:
            return
        for ordinal in ordinals:
            layer, parts = self.model.moe_layers[ordinal], (steps.ids, steps.weights, steps.probabilities)
            self.observer.routed(layer, *(part[ordinal] for part in parts))

    def _report(self) -> None:
        """Tell the policy what an earlier step was routed to."""
        if self._unreported is None:
            return
        (steps, tokens, begin, routing), self._unreported = self._unreported, None
        probabilities, weights, ids = steps.parts_of(routing)
        layers = self.model.moe_layers[begin : begin + len(routing)]
        for row, token in enumerate(tokens):
            scores: Sequence[Sequence[float]] = probabilities[:, row].tolist()
            self.experts.hit_events(token, layers, ids[:, row].tolist(), weights[:, row].tolist(), scores)

    # A chunk of a prompt

    def _chunk(self, stretch: Stretch, all_logits: bool, check: Callable[[], None] | None) -> Tensor:
        """-> logits [V] of the last token, or of all: [T, V]"""
        with self._pass([stretch]):
            self._report()
            return self._run_chunk(stretch, all_logits, check)

    def _run_chunk(self, stretch: Stretch, all_logits: bool, check: Callable[[], None] | None) -> Tensor:
        model, (kv_cache, token_ids), last = self.model, stretch, self._steps_of(1).on_gpu
        x = embed(model, torch.tensor(token_ids, device=model.device))
        places = kv_cache.rows(kv_cache.length + len(token_ids))
        distinct = torch.zeros(self.config.num_experts, device=model.device)
        ordinal = 0
        for index in range(self.config.num_hidden_layers):
            if check is not None:
                check()
            chunk_attention(model, index, x, places)
            if not self.config.moe_layers[index]:
                norm = model.layers[index].weights.post_attention_norm
                chunk_network(model, index, rms_norm(model, x, norm), x)
                continue
            h, probabilities, weights, ids = chunk_router(model, index, x)
            if self.observer is not None:
                self.observer.routed(index, ids.cpu(), weights.cpu(), probabilities.cpu())
            seen = round_to_int8(h) if self._rounds else h
            if self.experts.is_complete:
                last.table[ordinal].copy_(self.table[ordinal], non_blocking=True)
                self._prefill.run(seen, ids, last.table[ordinal], self.arena, weights)
                distinct += torch.zeros_like(distinct).scatter_(0, ids.view(-1).long(), 1.0)
            else:
                self._stream(index, seen, ids, weights, probabilities, token_ids)
            self._prefill.combine(weights, x)
            chunk_network(model, index, h, x)
            ordinal += 1
        if all_logits:
            logits = chunk_logits(model, x).cpu()
        else:
            last.x.copy_(x[-1:])
            last.output()
            logits = last.logits[0].cpu()
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
            table = self._table_of(group).to(h.device, non_blocking=True)
            self._prefill.run(h, ids, table, self.arena, weights)


class _StepRouting(NamedTuple):
    """What a step's layers from `begin` on were routed to."""

    steps: Steps
    tokens: list[int]
    begin: int  # of the layers with experts
    routing: Tensor


class _At(NamedTuple):
    """A sequence of a length, for a step that nobody counts."""

    length: int
    pages: list[int]
