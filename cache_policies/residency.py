"""Which experts are resident and which must come: the rules that the engine and a replay share, in ids only.

An event (one layer of one token, or of a prefill chunk) is atomic: what it needs is held until it is settled
and never a victim of its own. Which experts leave is decided when the event begins or ends, never by the
order in which reads finish; so a recorded run, replayed, gives the same hits to the last one.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cache_policies.policy import CachePolicy, ExpertId, Geometry

# Slots that a prefill layer may take from others for the experts that only pass through: enough to keep
# reads under way, and never more than a sixteenth of all.
PREFILL_READS_AHEAD = 4


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """One layer of a prefill chunk: who is there, who comes, who goes.

    `victims` leave before anything is read. Then `hits` are served, and of them `leaving` go as soon as they
    are; `passing` are read, served and dropped; `staying` are read last and kept.
    """

    victims: list[ExpertId]
    hits: list[ExpertId]
    leaving: frozenset[ExpertId]
    passing: list[ExpertId]
    staying: list[ExpertId]


class Residency:
    """The residents of a cache with `geometry.capacity` slots, under one policy.

    `begin` an event, tell what `arrived`, `settle` it. With per-layer capacity every layer has a pool of its
    own; a global cache has one pool. Held experts are in no pool, so the policy cannot choose them.
    """

    def __init__(self, policy: CachePolicy, geometry: Geometry, spare: int = 0) -> None:
        """`spare`: slots beyond the capacity, through which a prefill's experts may pass."""
        if geometry.capacity < geometry.top_k:
            raise ValueError(f"a capacity of {geometry.capacity} experts is below top-k {geometry.top_k}")
        self.policy, self.geometry, self.spare = policy, geometry, spare
        self.held: dict[ExpertId, None] = {}
        shared: dict[ExpertId, None] = {}
        self._pools = [{} if geometry.per_layer else shared for _ in range(geometry.layers)]
        self._of_layer: list[set[ExpertId]] = [set() for _ in range(geometry.layers)]
        self._share = self.slots // geometry.layers  # of a layer, in prefill
        self._reads_ahead = max(1, min(PREFILL_READS_AHEAD, self.slots // 16))

    @property
    def slots(self) -> int:
        """Room for this many experts in all."""
        return self.geometry.capacity * self._pool_count

    def __contains__(self, expert: ExpertId) -> bool:
        return expert in self._of_layer[expert[0]]

    @property
    def residents(self) -> frozenset[ExpertId]:
        return frozenset().union(*self._of_layer)

    def begin(
        self,
        layer: int,
        routed: Sequence[int],
        weights: Sequence[float] | None = None,
        scores: Sequence[float] | None = None,
        token: int = -1,
    ) -> tuple[list[ExpertId], list[ExpertId]]:
        """One token's event -> (the experts that must come, in top-k order; the victims that made room)."""
        missing = self.look_up(layer, routed, weights, scores, token)
        return missing, self.make_room(layer, len(missing)) if missing else []

    def look_up(
        self,
        layer: int,
        routed: Sequence[int],
        weights: Sequence[float] | None = None,
        scores: Sequence[float] | None = None,
        token: int = -1,
    ) -> list[ExpertId]:
        """Observe one token's event and hold what is resident of it -> what is not, in top-k order."""
        self.policy.step(layer, routed, weights, scores, token)
        return self.hold(layer, routed)

    def begin_together(
        self, layer: int, experts: Sequence[int]
    ) -> tuple[list[ExpertId], list[ExpertId]]:
        """One event of several sequences' tokens, which the policy has seen; `experts` that they need, each
        once -> as `begin`. They must fit in the capacity."""
        missing = self.hold(layer, experts)
        return missing, self.make_room(layer, len(missing)) if missing else []

    def hold(self, layer: int, experts: Sequence[int]) -> list[ExpertId]:
        """Hold what is resident of an event that the policy has seen -> what is not."""
        missing: list[ExpertId] = []
        pool, held = self._pools[layer], self.held
        for expert in experts:
            key = (layer, expert)
            if key in pool:
                held[key] = None
                del pool[key]
            else:
                missing.append(key)
        return missing

    def make_room(self, layer: int, coming: int) -> list[ExpertId]:
        """The victims that leave so that `coming` experts may join those held."""
        surplus = len(self._pools[layer]) + len(self.held) + coming - self.geometry.capacity
        return self._evict(layer, surplus) if surplus > 0 else []

    def free(self, layer: int) -> int:
        """How many may come to this layer's pool before somebody must leave it."""
        return self.geometry.capacity - len(self._pools[layer]) - len(self.held)

    def admit(self, keys: Sequence[ExpertId]) -> tuple[list[ExpertId], list[ExpertId]]:
        """Admit experts of one pool that no event waits for, as far as the policy prefers them to residents
        -> (those admitted, the victims, none of them held)."""
        layer = keys[0][0]
        for key in keys:
            self.policy.inserted(key)
            self._pools[layer][key] = None
        gone = self._evict(layer, max(0, -self.free(layer)))
        admitted = [key for key in keys if key not in gone]
        for key in admitted:
            self._of_layer[key[0]].add(key)
        return admitted, [key for key in gone if key not in keys]

    def arrived(self, key: ExpertId) -> None:
        """An expert that the event lacked is resident now, and held."""
        self.held[key] = None
        self._of_layer[key[0]].add(key)
        self.policy.inserted(key)

    def settle(self) -> None:
        """The event is over: nothing is held any more."""
        for key in self.held:
            self._pools[key[0]][key] = None
        self.held.clear()

    def begin_chunk(self, layer: int, experts: Sequence[int]) -> ChunkPlan:
        """One layer of a prefill chunk, whose tokens the policy has seen; `experts` that it needs, each once.

        The policy chooses who stays, of the layer's residents and the chunk's experts together, so that a
        cache begins to decode with what the prompt's routing recommends (DAOP, arXiv 2501.10375). The layer
        ends with its share of the slots, or what it had before if that was more: a long prompt does not wash
        out what decoding will need elsewhere.
        """
        assert not self.held
        needed = [(layer, expert) for expert in experts]
        mine, pool = self._of_layer[layer], self._pools[layer]
        hits = [key for key in needed if key in mine]
        missing = [key for key in needed if key not in mine]
        together = mine.union(needed)
        share = max(self._share, len(mine))
        for key in missing:
            self.policy.inserted(key)
        gone = set(self.policy.victims(together, max(0, len(together) - share)))
        passing = [key for key in missing if key in gone]
        staying = [key for key in missing if key not in gone]
        leaving = gone.intersection(hits)
        victims = [key for key in sorted(gone) if key in mine and key not in leaving]

        free = self.slots - sum(map(len, self._of_layer)) + len(victims)
        ahead = min(self._reads_ahead, len(passing)) - self.spare
        lacking = max(len(staying) - len(leaving), ahead) - free
        if lacking > 0 and not self.geometry.per_layer:
            others = pool.keys() - together
            taken = self.policy.victims(others, min(lacking, len(others)))
            victims += taken
            free += len(taken)
        # A budget of a few slots: one of the layer's must go.
        if passing and not free + self.spare and not leaving:
            victim = self.policy.victims(mine.difference(victims), 1)[0]
            if victim in hits:
                leaving.add(victim)
            else:
                victims.append(victim)
        for key in victims:
            self._remove(key)
        for key in hits:
            del pool[key]
            self.held[key] = None
        return ChunkPlan(victims, hits, frozenset(leaving), passing, staying)

    def chunk_served(self, plan: ChunkPlan, lost: Collection[ExpertId] = ()) -> None:
        """A chunk's experts have been served: what stays is resident, the rest has left.

        `lost`: those that were to stay, and could not be read.
        """
        if lost:
            self.policy.victims(lost, len(lost))
        for key in plan.staying:
            if key not in lost:
                self.held[key] = None
                self._of_layer[key[0]].add(key)
        for key in plan.leaving:
            self._remove(key)
        self.settle()

    def recover(self, present: Collection[ExpertId]) -> list[ExpertId]:
        """After an event that was cut short anywhere: nothing is held, and who is not `present` is not
        resident. Returns victims, should there be too many."""
        self.held.clear()
        found = [key for key in sorted(self.residents) if key in present]
        for layer in range(self.geometry.layers):
            self._pools[layer].clear()
            self._of_layer[layer].clear()
        for key in found:
            self._pools[key[0]][key] = None
            self._of_layer[key[0]].add(key)
        pools = range(self._pool_count)
        surplus = ((layer, len(self._pools[layer]) - self.geometry.capacity) for layer in pools)
        return [key for layer, n in surplus if n > 0 for key in self._evict(layer, n)]

    def evict_all(self) -> list[ExpertId]:
        """Empty the cache; the policy keeps what it learnt."""
        self.settle()
        return [
            key for layer in range(self._pool_count) for key in self._evict(layer, len(self._pools[layer]))
        ]

    @property
    def _pool_count(self) -> int:
        return self.geometry.layers if self.geometry.per_layer else 1

    def _remove(self, key: ExpertId) -> None:
        self.held.pop(key, None)
        self._pools[key[0]].pop(key, None)
        self._of_layer[key[0]].discard(key)

    def _evict(self, layer: int, n: int) -> list[ExpertId]:
        pool = self._pools[layer]
        victims = self.policy.victims(pool.keys(), n)
        for key in victims:
            del pool[key]
            self._of_layer[key[0]].discard(key)
        return victims
