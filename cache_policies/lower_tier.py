"""Which experts are resident in the lower of two tiers: RAM below VRAM, in ids only.

The upper tier is a `Residency` of its own. What lies in both is the upper one's; its copy below is a slot
that may be taken at any time, so the two hold nearly as many distinct experts as they have slots. The lower
policy sees every event and judges both tiers as one: it learns of an expert when it comes from the drive, and
chooses who leaves for good, among those that are only here and those that the upper tier gives up. As in
`Residency`, nothing depends on the order in which reads finish.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from cache_policies.policy import CachePolicy, ExpertId, Geometry
from cache_policies.residency import ChunkPlan, Residency


@dataclass(frozen=True, slots=True)
class Descent:
    """What an event changes below: `missing` must be read, `victims` leave for good, `falling` come down."""

    missing: list[ExpertId]
    victims: list[ExpertId]
    falling: list[ExpertId]


class LowerTier(Residency):
    """The experts that are in this tier only. Per-layer capacity needs an upper tier with the same."""

    def __init__(self, policy: CachePolicy, geometry: Geometry, spare: int, above: int) -> None:
        """`above`: the upper tier's capacity, counted as `geometry.capacity` is."""
        everything = geometry.experts * (1 if geometry.per_layer else geometry.layers)
        self.holds_all = geometry.capacity >= everything
        self.all_fit = geometry.capacity + above >= everything  # nobody leaves for good, once all are there
        # Where the drive is read all the time, slots are kept for what is on its way up; else a read would
        # have to evict before it is known whether somebody better comes down.
        flow = 0
        if not self.all_fit:
            flow = min(geometry.top_k, geometry.capacity // 16, geometry.capacity - geometry.top_k)
        super().__init__(policy, replace(geometry, capacity=geometry.capacity - flow), spare)
        if self.all_fit:
            self._share = geometry.experts
        self._room = geometry.capacity
        self._rising: Collection[ExpertId] = ()

    def begin_below(
        self, lacking: Sequence[ExpertId], rising: Collection[ExpertId], leaving: Sequence[ExpertId]
    ) -> Descent:
        """One token's event, which the policy has observed. Of the experts that the upper tier lacks, in
        top-k order, `rising` go up, the others are only used; `leaving` is what it gives up."""
        layer = lacking[0][0]
        pool = self._pools[layer]
        missing: list[ExpertId] = []
        for key in lacking:
            if key in pool:
                self.held[key] = None
                del pool[key]
            else:
                missing.append(key)
        self._rising = rising
        # What is read needs a slot before anything can come down.
        short = len(pool) + len(lacking) - self._room
        victims = self._evict(layer, short) if short > 0 else []
        gone, falling = self._admit(layer, leaving, len(lacking) - len(rising))
        return Descent(missing, victims + gone, falling)

    def settle(self) -> None:
        """The event is over: what has risen is no longer here alone."""
        for key in self._rising:
            if key in self.held:
                del self.held[key]
                self._of_layer[key[0]].discard(key)
        self._rising = ()
        super().settle()

    def begin_chunk_below(
        self, layer: int, passing: Sequence[ExpertId], rising: Sequence[ExpertId], leaving: Sequence[ExpertId]
    ) -> tuple[ChunkPlan, Descent]:
        """One layer of a prefill chunk. Of the experts that the upper tier lacks, `rising` stay there and
        `passing` do not; `leaving` is what it gives up.

        The plan is that of what will not be above. What is here and rises or leaves must be copied up before
        all else: then there is room for what falls, and one slot at least to read through.
        """
        missing = [key for key in (*passing, *rising) if key not in self]
        for key in rising:
            if key in self:
                self._remove(key)
            else:
                self.policy.inserted(key)
        plan, falling, victims = self._plan_chunk(layer, passing, leaving)
        others = [key for key in falling if key[0] != layer]  # which are counted
        free = self._room + self.spare - self._count(layer) + len(others) + len(plan.leaving) - bool(missing)
        if free < 0:
            plan = self._vacate(plan, layer, victims)
        cut = falling[max(0, free) :]
        if cut:
            self.policy.victims(cut, len(cut))
            plan = replace(plan, staying=[key for key in plan.staying if key not in cut])
            for key in cut:
                self._remove(key)
        missing.sort(key=plan.staying.__contains__)  # last, for they keep their slots
        return plan, Descent(missing, victims, falling[: max(0, free)])

    def _plan_chunk(
        self, layer: int, passing: Sequence[ExpertId], leaving: Sequence[ExpertId]
    ) -> tuple[ChunkPlan, list[ExpertId], list[ExpertId]]:
        """(plan, who falls, whom those of other layers displace)"""
        own = [key for key in leaving if key[0] == layer]
        plan = self.begin_chunk(layer, [expert for _, expert in (*passing, *own)])
        beside = len(self.held) + len(plan.staying) - len(plan.leaving)
        victims, falling = self._admit(layer, [key for key in leaving if key[0] != layer], beside)
        return plan, [key for key in own if key in plan.staying] + falling, victims

    def _vacate(self, plan: ChunkPlan, layer: int, victims: list[ExpertId]) -> ChunkPlan:
        """A budget of a few slots: one expert must go, so that others can be read. Adds to `victims`, or to
        what leaves once it has been served."""
        candidates = {**self._pools[layer], **self.held}.keys() - plan.leaving
        (victim,) = self.policy.victims(candidates, 1)
        if victim in self.held:
            return replace(plan, leaving=plan.leaving | {victim})
        self._remove(victim)
        victims.append(victim)
        return plan

    def _admit(
        self, layer: int, leaving: Sequence[ExpertId], beside: int
    ) -> tuple[list[ExpertId], list[ExpertId]]:
        """Who stays of the residents in the pool and of those from above, beside `beside` others: (residents
        that go, those from above that come)."""
        pool = self._pools[layer]
        for key in leaving:
            pool[key] = None
            self._of_layer[key[0]].add(key)
        surplus = len(pool) + beside - self.geometry.capacity
        gone = self._evict(layer, min(surplus, len(pool))) if surplus > 0 else []
        return [key for key in gone if key not in leaving], [key for key in leaving if key not in gone]

    def _count(self, layer: int) -> int:
        """The residents that share a layer's capacity."""
        return len(self._of_layer[layer]) if self.geometry.per_layer else sum(map(len, self._of_layer))
