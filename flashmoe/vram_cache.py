"""The experts in VRAM: the upper tier of two, over the RAM slots of an `ExpertCache`.

The rules are those of any cache (`cache_policies/residency.py`): the policy observes a layer's routed set
whole, then victims leave, then what is missing comes, here by copies from RAM slots, where the drive's reads
land first. What leaves VRAM falls to RAM if the RAM policy wants it (`cache_policies/lower_tier.py`); mostly
its copy is still there. Hits, misses and victims depend on what is asked for, never on when a copy or a read
ends: that is `tier_copies.py`'s. Knows nothing about tokens, kernels or graphs.

The caller promises that when an event begins, what the GPU was given for earlier ones has been done.
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from cache_policies.policy import CachePolicy, Geometry
from cache_policies.residency import ChunkPlan, Residency
from flashmoe.copy_engine import CopyEngine, Ticket
from flashmoe.expert_cache import ExpertCache, show_chunk
from flashmoe.expert_placement import Placement
from flashmoe.tier_copies import TierCopies, VramCounters
from flashmoe.weights import ExpertId
from kernels.expert_ffn import Addresses

ABSENT = -1  # in the table
GROUP = 16  # experts of a prompt that are computed together, at most
# Experts copied to VRAM after they were read in place, as a share of those read: both share PCIe.
PROMOTED_SHARE = 0.25
IDLE_COPIES = 8  # idle time of PCIe that is remembered, in copies of one expert


# What a policy is told of one token in an event, as in `CachePolicy.step`: ids, weights, scores, token.
TokenRouting = tuple[Sequence[int], Sequence[float], Sequence[float] | None, int]


class VramCache:
    """Not thread-safe; one computation at a time. Layers are named as the model does, table rows count those
    with experts."""

    def __init__(
        self,
        ram: ExpertCache,
        policy: CachePolicy,
        geometry: Geometry,
        engine: CopyEngine,
        table: NDArray[np.int32],
        placement: Placement | None,
        spare: int,
        in_place: bool = False,
    ) -> None:
        """`ram` is empty yet, and closed with this. `table` [layers with experts, E] is filled with each
        expert's slot or -1. `spare`: slots beyond the policy's capacity, for what is on its way. `in_place`:
        the GPU computes with what is in RAM as it lies; the table says `engine.slots` + its RAM slot."""
        self.policy, self.ram, self.placement = policy, ram, None if in_place else placement
        self.in_place, self._first = in_place, engine.slots
        self.counters = VramCounters()
        self._up = Residency(policy, geometry, spare)
        self.slots = self._up.slots + spare
        self._experts = geometry.layers * geometry.experts
        assert engine.slots >= self.slots and table.shape == (geometry.layers, geometry.experts)
        assert spare or self.slots >= self._experts, "what comes needs a slot before its victim's is free"
        self._engine, self._table = engine, table
        self._ordinals = {layer: ordinal for ordinal, layer in enumerate(ram.layers)}
        self._pinned = ram.arena
        engine.pin(*self._pinned)
        self._copies = TierCopies(engine, ram, self.slots, self.counters)
        ram.serve_above(geometry.capacity, self._copies.wait_for, self._moved_below)
        self._evicts = self._up.slots < self._experts
        self._slots: dict[ExpertId, int] = {}  # of residents, also those whose copy is on its way
        self._ready: dict[int, set[int]] = {layer: set() for layer in ram.layers}  # what the table has
        self._ready_of = list(self._ready.values())  # by ordinal
        self._unlisted: dict[ExpertId, Ticket] = {}  # residents not in the table yet, and their copies
        self._staged: dict[ExpertId, tuple[int, Ticket]] = {}  # guesses: slot, copy
        self._idle_s = 0.0  # of PCIe by the cost model: for what the CPU computed and VRAM should have
        self._wanted: tuple[list[ExpertId], int] | None = None  # guesses that wait for the event's end
        self._used_in_place: dict[ExpertId, None] = {}  # since the last promotions
        # Whom `promote` copies, with slots and copies, and whom they displace; of one pool each.
        self._promoting: list[tuple[list[tuple[ExpertId, int, Ticket]], list[ExpertId]]] = []
        self._table_changes: tuple[list[int], list[int], list[int]] | None = None  # layers, experts, slots
        self._is_committed = False  # the table has them, and nothing else yet
        self._promotable = 0.0  # what may still be copied beside reading in place, in experts
        self._promoted_layer = 0  # whose turn was last
        self._chunk: ChunkPlan | None = None
        self._open = False  # an event has begun and not been settled
        self._event = 0  # counts up: a generator left over from an earlier event must not end a later one
        table.fill(ABSENT)

    @property
    def resident(self) -> frozenset[ExpertId]:
        """The experts in VRAM; layers are counted among those with experts."""
        return self._up.residents

    @property
    def is_complete(self) -> bool:
        """Every expert is in VRAM, and in the table."""
        return len(self._slots) == self._experts and not self._unlisted and not self._open

    @property
    def needs_drive(self) -> bool:
        """An expert may be in neither tier."""
        return not self.ram.lower.holds_all

    # One token

    def all_resident(self, layer: int, ids: Collection[int]) -> bool:
        """Whether the table has all of a layer's routed experts."""
        return self._ready[layer].issuperset(ids) and not self._open

    def hit_event(
        self,
        layer: int,
        ids: Sequence[int],
        weights: Sequence[float],
        scores: Sequence[float] | None = None,
        token: int = -1,
    ) -> None:
        """Book an event whose experts were all in the table. Changes no table."""
        self.hit_events(token, (layer,), (ids,), (weights,), None if scores is None else (scores,))

    def hit_events(
        self,
        token: int,
        layers: Sequence[int],
        ids: Sequence[Sequence[int]],
        weights: Sequence[Sequence[float]],
        scores: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """Book such events of some layers of a token: ids and weights [layers][K], scores [layers][E]."""
        self._end_event()
        self._open = True
        lacking: list[ExpertId] = []
        guesses = bool(self._staged) or self.ram.has_guesses
        for i, layer in enumerate(layers):
            ordinal, routed = self._ordinals[layer], ids[i]
            seen = (routed, weights[i], None if scores is None else scores[i], token)
            self._observe_below(ordinal, seen)
            if self._evicts:
                self.policy.step(ordinal, *seen)
            if self.in_place:
                lacking += [key for expert in routed if (key := (ordinal, expert)) not in self._slots]
            self.counters.hits += len(routed)
            if guesses:
                self._give_up_guesses(ordinal)
        if lacking:
            self.counters.hits -= len(lacking)
            self._note_in_place(lacking, len(lacking))
        self._close_event()

    def fetch(
        self,
        layer: int,
        ids: Sequence[int],
        weights: Sequence[float],
        scores: Sequence[float] | None = None,
        token: int = -1,
    ) -> "MissEvent":
        """Begin an event of which an expert is not in the table. Copies of what RAM holds are under way when
        this returns, and reads of the rest. `weights` and `scores` must stay as they are until it is settled.
        """
        return self._fetch(layer, ids, [(ids, weights, scores, token)])

    def can_fetch_together(self, experts: int) -> bool:
        """Whether one event may bring so many experts of a layer, all of which stay until its end."""
        return self.in_place and experts <= self.ram.lower.geometry.capacity

    def fetch_together(
        self, layer: int, experts: Sequence[int], tokens: Sequence[TokenRouting]
    ) -> "MissEvent":
        """As `fetch`, of several sequences' tokens; `experts`, each once, are those that they need."""
        assert self.can_fetch_together(len(experts))
        return self._fetch(layer, experts, tokens)

    def _fetch(self, layer: int, ids: Sequence[int], tokens: Sequence[TokenRouting]) -> "MissEvent":
        recovered = self._begin_event()
        ordinal = self._ordinals[layer]
        keys = [(ordinal, expert) for expert in ids]
        missing = [key for key in keys if key not in self._slots]
        below = self.ram.lower
        in_ram = [key for key in missing if key in below]
        reads = [key for key in missing if key not in below and key not in self._staged]
        if reads:
            self.ram.read_early(reads)
        on_cpu = in_ram[len(in_ram) - self._share_of_cpu(len(in_ram)) :]
        self.counters.hits += len(ids) - len(missing)
        self.counters.cpu_experts += len(on_cpu)
        if self.in_place:
            self._note_in_place(missing, len(in_ram))
        else:
            self._note_misses(len(missing), len(in_ram))
        # What the table holds again after an error, the GPU may have looked for in vain.
        listed = self._ready[layer] if recovered else ()
        waiting = [key for key in keys if key in self._unlisted or key[1] in listed]
        rising = [] if self.in_place else [key for key in missing if key not in on_cpu]
        event = MissEvent(self, ordinal, ids, tokens, missing, rising, on_cpu, waiting)
        for key in event.rising:
            if key in self._staged:
                self._take_guess(key)
            elif self.ram.holds(key) and self._copies.free:
                self._slots[key], self._unlisted[key] = self._copies.up(key)
            else:
                continue
            waiting.append(key)
        if reads or any(key not in self._slots for key in event.rising):
            self._decide(event)
            if self.in_place:  # guesses that RAM had ready
                waiting += [key for key in reads if self.ram.holds(key)]
        return event

    def promote(self) -> None:
        """Copy what was computed in place to free slots, as far as VRAM's policy prefers it to a resident:
        while the GPU runs the next token, which sees nothing of it before `commit`.

        What would displace others is limited: the copies share PCIe with what is read in place.
        """
        if not self._used_in_place:
            return
        self._begin_event()
        self._table_changes = None
        used, self._used_in_place = self._used_in_place, {}
        self._promotable = min(self._promotable + PROMOTED_SHARE * len(used), float(self._up.spare))
        for keys in self._candidates(used):
            admitted, leaving = self._up.admit(keys)
            if admitted:
                self._promoting.append(([(key, *self._copies.up(key)) for key in admitted], leaving))
                self._promotable -= len(leaving)
                self._promoted_layer = admitted[-1][0]
        self._close_event()
        if self.ram.lower.holds_all and self._promoting:
            changes: dict[ExpertId, int] = {}
            for coming, leaving in self._promoting:
                changes |= {key: slot for key, slot, _ in coming}
                changes |= {key: self._first + self.ram.slot(key) for key in leaving}
            self._table_changes = [k[0] for k in changes], [k[1] for k in changes], list(changes.values())

    def _candidates(self, used: Iterable[ExpertId]) -> Iterator[list[ExpertId]]:
        """What may be promoted, pool by pool: each layer in its turn, as far as slots last."""
        layers, first = len(self._ready_of), self._promoted_layer + 1
        per_layer, slots = self._up.geometry.per_layer, len(self._copies.free)
        pools: dict[int, list[ExpertId]] = {}
        for key in sorted(used, key=lambda key: (key[0] - first) % layers):
            if key not in self._slots and key not in self._up and self.ram.holds(key):
                pools.setdefault(key[0] if per_layer else 0, []).append(key)
        for keys in pools.values():
            most = min(slots, self._up.free(keys[0][0]) + int(self._promotable))
            if most > 0:
                yield keys[:most]
                slots -= most

    def commit(self) -> None:
        """Enter in the table what `promote` has copied, and take out what it displaces. The GPU must be
        idle."""
        if self._open:  # after a Ctrl-C: to be put in order while nobody computes
            self._end_event()
        if not self._promoting or self._is_committed:
            return
        self._engine.wait(self._promoting[-1][0][-1][2])
        if self._table_changes is None:
            self._book_promotions()
        else:  # where everything is in RAM, the rest has time until the GPU is at work again
            layers, experts, slots = self._table_changes
            self._table[layers, experts] = slots
            self._is_committed = True

    def _book_promotions(self) -> None:
        """The rest of `commit`."""
        self._is_committed = False
        self._begin_event()
        promoting, self._promoting, self._table_changes = self._promoting, [], None
        for coming, leaving in promoting:
            if self.ram.lower.holds_all:
                self._exchange(coming, leaving)
            else:  # one by one: what falls needs the RAM slot of what rises
                for i, one in enumerate(coming):
                    self._exchange([one], leaving[i : i + 1])
                    self._copies.let_fall()
        self.counters.promoted += sum(len(coming) for coming, _ in promoting)
        self._let_fall()
        self._close_event()

    def prefetch(self, guesses: Iterable[ExpertId], at_most: int) -> None:
        """Copy guesses that are in RAM to spare slots, and have the others read into RAM's, in the order
        given; they evict nothing. While an event goes on they wait for its end."""
        keys = [(self._ordinals[layer], expert) for layer, expert in guesses]
        if self._open:
            self._wanted = keys, at_most
        else:
            self._begin_event()
            self._send_guesses(keys, at_most)
            self._close_event()

    # A prompt

    def observe(
        self,
        layer: int,
        routed: Sequence[Sequence[int]],
        weights: Sequence[Sequence[float]],
        scores: NDArray[np.float32] | None = None,
        tokens: Sequence[int] | None = None,
    ) -> None:
        """Show both policies the tokens of a chunk, as `ExpertCache.observe` does."""
        self._end_event()
        ordinal = self._ordinals[layer]
        self.ram.observe(layer, routed, weights, scores, tokens)
        show_chunk(self.policy, ordinal, routed, weights, scores, tokens)

    def stream(self, layer: int, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """One prefill event: groups of (expert, slot), every expert once, those in VRAM first.

        The compute stream waits for a group's copies; when the next group is asked for, what computes this
        one must have been enqueued. `experts`: each once, in `serving_order`. Raises ReadError; both tiers
        stay usable.
        """
        self.commit()
        self._begin_event()
        self._drop_guesses(self._staged)
        ordinal = self._ordinals[layer]
        plan = self._chunk = self._up.begin_chunk(ordinal, experts)
        leaving = [key for key in plan.hits if key in plan.leaving]
        down, reads = self.ram.begin_chunk_below(
            ordinal, plan.passing, plan.staying, [*plan.victims, *leaving]
        )
        here = deque(key for key in (*plan.staying, *plan.passing) if self.ram.holds(key))
        self.counters.hits += len(plan.hits)
        self.counters.misses += len(here) + len(reads)
        self.counters.ram_hits += len(here)
        self._engine.copies_wait_for_compute()
        self._leave(plan.victims, down)
        with self._recovering():
            yield from self._groups(plan, down, here, deque(reads))
            self._let_fall()
            self._up.chunk_served(plan)
            self._chunk = None
            self.ram.end_event()
            self._close_event()

    def _groups(
        self, plan: ChunkPlan, down: Collection[ExpertId], here: deque[ExpertId], reads: deque[ExpertId]
    ) -> Iterator[list[tuple[int, int]]]:
        """The groups of a chunk; while one is computed the next is copied."""
        staying, to_fall = set(plan.staying), len(plan.leaving.intersection(down))
        ready = [(key, self._slots[key]) for key in plan.hits]
        while True:
            coming = self._copy_group(here, reads, staying, to_fall, wait=not ready)
            if ready:
                self._list(key for key, _ in ready)
                yield [(key[1], slot) for key, slot in ready]
                for key, slot in ready:
                    if key in plan.leaving:
                        self._leave([key], down)
                        to_fall = 0
                    elif key not in self._slots:
                        self._copies.free.append(slot)
                self._engine.copies_wait_for_compute()
            elif not coming:
                assert not here and not reads, "no slot is free for what must come"
                return
            ready = coming

    def _copy_group(
        self, here: deque[ExpertId], reads: deque[ExpertId], staying: Collection[ExpertId], to_fall: int,
        wait: bool,
    ) -> list[tuple[ExpertId, int]]:
        """Copy what is in RAM, as far as it is and slots are free; `wait` for at least one. Half of the slots
        are for the group after this. RAM slots for what falls, and `to_fall` later, are not read into."""
        group: list[tuple[ExpertId, int]] = []
        copies = self._copies
        most = min(GROUP, (len(copies.free) + len(copies.falling) + 1) // 2)
        while len(group) < most:
            self.ram.read_ahead(reads, len(copies.falling) + to_fall)
            if not here:
                here.extend(self.ram.arrivals(wait and not group))
            if not here:
                break
            key = here.popleft()
            slot, self._unlisted[key] = copies.up(key)
            if key in staying:
                self._slots[key] = slot
            self.ram.copied(key)
            group.append((key, slot))
        return group

    # The end of an event, and of everything

    def evict_all(self) -> None:
        """Empty every slot of both tiers, for a cold start; the policies keep what they learnt."""
        self.commit()
        self._begin_event()
        self._drop_guesses(self._staged)
        self._leave(self._up.evict_all(), ())
        self.ram.evict_all()
        self._close_event()

    def close(self) -> None:
        """Stop copying and reading, and give the memory back."""
        self.evict_all()
        self._copies.recover(set())
        self._engine.unpin(self._pinned[0])
        self._engine.close()
        self.ram.close()

    def _close_event(self) -> None:
        mine, ram = self.counters, self.ram.counters
        mine.bytes_read, mine.stall_s, mine.read_s = ram.bytes_read, ram.stall_s, ram.read_s
        self._open = False

    def _begin_event(self) -> bool:
        """Whether the one before had to be ended."""
        recovered = self._end_event()
        self._event += 1
        self._open = True
        return recovered

    def _end_event(self) -> bool:
        """Make ids, slots and table agree after an event that an error or Ctrl-C cut short, if one was."""
        if not self._open:
            if self._is_committed:
                self._book_promotions()
            return False
        self.ram.end_event()
        if self._chunk is not None:
            lost = [key for key in self._chunk.staying if key not in self._slots]
            self._up.chunk_served(self._chunk, lost)
            self._chunk = None
        self._up.recover(self._slots)
        self._slots = {key: slot for key, slot in self._slots.items() if key in self._up}
        self._staged.clear()
        self._promoting.clear()
        self._table_changes, self._is_committed = None, False
        self._copies.recover(set(self._slots.values()))
        self._table.fill(ABSENT)
        for ready in self._ready.values():
            ready.clear()
        self._unlisted = dict.fromkeys(self._slots, 0)
        self._list(self._slots)
        self.ram.reconcile(self._slots.keys())
        for key in self.ram.lower.residents:
            self._moved_below(key, self.ram.slot(key))
        self._wanted = None
        self._open = False
        return True

    @contextmanager
    def _recovering(self) -> Iterator[None]:
        """An error leaves both tiers in order before it goes up."""
        event = self._event
        try:
            yield
        except BaseException:
            if event == self._event:
                self._end_event()
            raise

    def _settle(self, event: "MissEvent") -> None:
        if not event.is_decided:
            self._decide(event)
        self.ram.end_event()
        self._let_fall()
        self._promote(event.on_cpu)
        self._up.settle()
        if self._wanted is not None:
            wanted, self._wanted = self._wanted, None
            self._send_guesses(*wanted)
        self._close_event()

    # Who goes and who comes

    def _decide(self, event: "MissEvent") -> None:
        """Ask both policies who leaves, and begin the event below. If what comes has slots already, that has
        time until the GPU has been given the event's work."""
        event.is_decided = True
        ordinal, rising = event.ordinal, event.rising
        for token in event.tokens:
            self._observe_below(ordinal, token)
            self.policy.step(ordinal, *token)
        self._up.hold(ordinal, event.ids)
        leaving = self._up.make_room(ordinal, len(rising)) if rising else []
        if event.missing:
            above = [key for key in rising if key in self._slots]
            self._leave(leaving, self.ram.begin_below(event.missing, rising, leaving, above))
        for key in rising:
            if key in self._slots:
                self._admit(key)
            elif self.ram.holds(key):
                self._bring(key)
                event.waiting.append(key)
        self._give_up_guesses(ordinal)

    def _bring(self, key: ExpertId) -> None:
        """A miss that RAM holds."""
        self._slots[key], self._unlisted[key] = self._copies.up(key)
        self._admit(key)

    def _admit(self, key: ExpertId) -> None:
        """A miss that has a slot is resident."""
        self._up.arrived(key)
        self.ram.copied(key)

    def _observe_below(self, ordinal: int, token: TokenRouting) -> None:
        if not self.ram.lower.all_fit:  # else nobody leaves
            self.ram.policy.step(ordinal, *token)

    def _share_of_cpu(self, misses: int) -> int:
        """How many of the misses that are in RAM the CPU computes; PCIe's idle time is noted."""
        if self.placement is None or not misses:
            return 0
        p, on_cpu = self.placement, self.placement.on_cpu(misses)
        copying_s, computing_s = p.queues_s(misses - on_cpu, on_cpu)
        self._idle_s = min(self._idle_s + max(0.0, computing_s - copying_s), IDLE_COPIES * p.copy_s)
        return on_cpu

    def _promote(self, on_cpu: Sequence[ExpertId]) -> None:
        """Copy what the CPU has computed, as far as PCIe has had idle time and VRAM's policy prefers it to a
        resident. No victim is of this event, which the GPU may still compute."""
        for key in on_cpu:
            assert self.placement is not None
            if self._idle_s < self.placement.copy_s:
                return
            admitted, leaving = self._up.admit([key])
            if not admitted:
                continue
            self._idle_s -= self.placement.copy_s
            self._leave(leaving, self.ram.begin_below([key], [key], leaving, ()))
            self._slots[key], self._unlisted[key] = self._copies.up(key)
            self.ram.copied(key)
            self.ram.end_event()
            self._let_fall()

    def _note_misses(self, misses: int, in_ram: int) -> None:
        self.counters.misses += misses
        self.counters.ram_hits += in_ram
        self.ram.counters.hits += in_ram
        self.ram.counters.misses += misses - in_ram

    def _note_in_place(self, used: Collection[ExpertId], in_ram: int) -> None:
        self._note_misses(len(used), in_ram)
        self.counters.in_place += len(used)
        self.counters.bytes_in += len(used) * self._engine.expert_bytes
        self._used_in_place.update(dict.fromkeys(used))

    def _let_fall(self) -> None:
        """Copy down what is to go; the GPU may then read it there."""
        self._copies.let_fall()
        if self.in_place:
            self._engine.compute_waits(self._engine.mark_out())

    def _enter(self, key: ExpertId, slot: int) -> None:
        """Say in the table where an expert is."""
        layer, expert = key
        self._table[layer, expert] = slot
        if slot == ABSENT:
            self._ready_of[layer].discard(expert)
        else:
            self._ready_of[layer].add(expert)

    def _moved_below(self, key: ExpertId, slot: int) -> None:
        """An expert is in a slot of RAM, or -1: not any more."""
        if self.in_place and (key not in self._slots or key in self._unlisted):
            self._enter(key, ABSENT if slot < 0 else self._first + slot)

    def _exchange(
        self, coming: Sequence[tuple[ExpertId, int, Ticket]], leaving: Sequence[ExpertId]
    ) -> None:
        """Residents of one pool for others, which have been copied."""
        keys = [key for key, _, _ in coming]
        self._leave(leaving, self.ram.begin_below(keys, keys, leaving, keys))
        for key, slot, _ in coming:
            self._slots[key] = slot
            self._enter(key, slot)
            self.ram.copied(key)
        self.ram.end_event()

    def _leave(self, leaving: Iterable[ExpertId], down: Collection[ExpertId]) -> None:
        """Give slots up: at once, or of those that go `down`, when they have been copied out."""
        for key in leaving:
            slot = self._slots.pop(key)
            self._unlisted.pop(key, None)
            below = self.ram.slot(key) if self.in_place else -1
            self._enter(key, ABSENT if below < 0 else self._first + below)  # at once: the GPU may look
            if key in down:
                self._copies.falling.append((key, slot))
            else:
                self._copies.free.append(slot)

    def _list(self, keys: Iterable[ExpertId]) -> None:
        """Let the compute stream wait for copies, and enter in the table those that are residents."""
        new = [key for key in keys if key in self._unlisted]
        if not new:
            return
        self._engine.compute_waits(max(self._unlisted[key] for key in new))
        for key in new:
            del self._unlisted[key]
            if (slot := self._slots.get(key)) is not None:
                self._enter(key, slot)

    # Guesses

    def _send_guesses(self, keys: Iterable[ExpertId], at_most: int) -> None:
        room = self._up.spare - 1 - len(self._staged)  # one for what an event brings
        below: list[ExpertId] = []
        for key in keys:
            if at_most <= 0:
                break
            if key in self._up or key in self._staged:
                continue
            if not self.ram.holds(key):
                below.append((self.ram.layers[key[0]], key[1]))
            elif room > 0 and not self.in_place:
                self._staged[key] = self._copies.up(key)
                self.counters.prefetch_issued += 1
                room, at_most = room - 1, at_most - 1
        if below and at_most > 0:
            self.ram.prefetch(below, at_most)

    def _take_guess(self, key: ExpertId) -> None:
        """A miss that has been copied ahead, or is being copied."""
        self._slots[key], ticket = self._staged.pop(key)
        self._unlisted[key] = ticket
        late = not self._engine.is_done(ticket)
        self.counters.prefetch_late += late
        self.counters.prefetch_hits += not late

    def _give_up_guesses(self, ordinal: int) -> None:
        """What a layer whose event has begun has not asked for."""
        if self._staged:
            self._drop_guesses([key for key in self._staged if key[0] == ordinal])
        self.ram.give_up_guesses(ordinal)

    def _drop_guesses(self, keys: Iterable[ExpertId]) -> None:
        for key in list(keys):
            slot, _ = self._staged.pop(key)
            self._copies.free.append(slot)
            self.counters.prefetch_wasted += 1
            self.counters.prefetch_bytes_wasted += self._engine.expert_bytes


class MissEvent:
    """A decode event with misses, until it is settled: compute `cpu` on the CPU and `late` on the GPU."""

    def __init__(
        self, cache: VramCache, ordinal: int, ids: Sequence[int], tokens: Sequence[TokenRouting],
        missing: Sequence[ExpertId], rising: Sequence[ExpertId], on_cpu: Sequence[ExpertId],
        waiting: list[ExpertId],
    ) -> None:  # fmt: skip
        """`waiting`: what has a slot and has not been told to the caller; the cache adds to it."""
        self.ordinal, self.ids, self.tokens, self.missing = ordinal, ids, tokens, missing
        self.rising, self.on_cpu, self.waiting = rising, on_cpu, waiting
        self.is_decided = False
        self._cache = cache
        self._places = {(ordinal, expert): place for place, expert in enumerate(ids)}
        self.cpu: list[tuple[int, Addresses]] = [
            (self._places[key], cache._copies.addresses_for_cpu(key)) for key in on_cpu
        ]

    def late(self) -> list[tuple[int, int]]:
        """(place in the routed ids, slot) of all that was not in the table when the event began and is not
        the CPU's. The compute stream waits for their copies; the table has them now. Raises ReadError."""
        return [pair for batch in self.late_batches() for pair in batch]

    def late_batches(self) -> Iterator[list[tuple[int, int]]]:
        """`late` in parts: what RAM held, then what reads bring, as they end."""
        cache = self._cache
        while True:
            if self.waiting:
                cache._list(self.waiting)
                batch = [(self._places[key], int(cache._table[key])) for key in self.waiting]
                self.waiting.clear()
                yield batch
            if not cache.ram.is_reading:
                return
            with cache._recovering():
                for key in cache.ram.arrivals():
                    if not cache.in_place:
                        cache._bring(key)
                    self.waiting.append(key)

    def settle(self) -> None:
        """The event is over, on the host's side: the GPU may still compute it."""
        self.late()
        self._cache._settle(self)
