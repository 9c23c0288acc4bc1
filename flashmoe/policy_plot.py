"""Draw a comparison: hit rates over capacity below Belady's ceiling, and the share of LRU's gap to it closed.

matplotlib is imported when a plot is drawn; its pyplot, which keeps figures in globals, is not used.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashmoe.compare import CEILING, FLOOR, CompareRow
from storage.safetensors_writer import write_whole

SUFFIXES = (".png", ".svg")
# Okabe and Ito's colours, which colour-blind people tell apart, without the yellow that white paper swallows.
# Line styles change when the colours begin again; markers differ from the first to the last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
STYLES = ("-", "--", ":")
MARKERS = "osD^vPX*<>phd"
CEILING_COLOUR = "#000000"
# Where there is hardly a gap, what is a little worse than LRU lies far below it, and would flatten the rest.
LOWEST_GAP = -60.0


@dataclass(frozen=True, slots=True)
class Series:
    """One policy's line: experts a layer, hit rates and shares of the gap in per cent, one point each."""

    policy: str
    capacities: tuple[int, ...]
    hit_rates: tuple[float, ...]
    gaps_closed: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Panels:
    """The two panels of one trace and scope; `ceiling` is Belady's line."""

    title: str
    num_experts: int
    series: tuple[Series, ...]
    ceiling: Series


def panels_of(rows: Sequence[CompareRow], policies: Sequence[str]) -> list[Panels]:
    """What a plot shows, of all `rows` of a comparison: the lines of `policies`, and Belady's in any case."""
    panels = []
    for trace, scope in dict.fromkeys((row.trace, row.scope) for row in rows):
        mine = [row for row in rows if (row.trace, row.scope) == (trace, scope)]
        shown = [_series(mine, policy) for policy in dict.fromkeys(policies) if policy != CEILING]
        slots = "slots of each layer" if scope == "layer" else "slots shared by all layers"
        panels.append(Panels(f"{trace}, {slots}", mine[0].num_experts, tuple(shown), _series(mine, CEILING)))
    return panels


def write_plot(path: Path, panels: Sequence[Panels]) -> None:
    """Draw as .png or .svg, by the name's ending; the file is there whole or not at all.

    Raises StorageError when it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8 * len(panels) + 0.4), layout="constrained")
    axes = figure.subplots(len(panels), 2, squeeze=False)
    for (left, right), shown in zip(axes, panels, strict=True):
        left.set_title(_plain(f"{shown.title}: hit rate"), loc="left", fontsize=10)
        right.set_title("share of the gap from LRU to Belady closed", loc="left", fontsize=10)
        ceiling = shown.ceiling
        left.plot(
            ceiling.capacities, ceiling.hit_rates, color=CEILING_COLOUR, linewidth=2, label="belady (ceiling)"
        )
        right.axhline(100, color=CEILING_COLOUR, linewidth=2)
        right.axhline(0, color="#B0B0B0", linewidth=1)
        for number, series in enumerate(shown.series):
            look = {
                "color": COLOURS[number % len(COLOURS)],
                "linestyle": STYLES[number // len(COLOURS) % len(STYLES)],
                "marker": MARKERS[number % len(MARKERS)],
            }
            label = _plain(_short(series.policy))
            left.plot(series.capacities, series.hit_rates, label=label, markersize=5, **look)
            points = [
                (capacity, gap)
                for capacity, gap in zip(series.capacities, series.gaps_closed, strict=True)
                if gap is not None
            ]
            if points and series.policy != FLOOR:
                right.plot(*zip(*points, strict=True), markersize=5, **look)
        if right.get_ylim()[0] < LOWEST_GAP:
            right.set_ylim(LOWEST_GAP, 107)
            right.text(0.01, 0.02, f"cut off at {LOWEST_GAP:.0f} %", transform=right.transAxes, fontsize=8)
        left.set_ylabel("hits, %")
        right.set_ylabel("of the gap, %")
        for axis in (left, right):
            axis.set_xlabel(f"experts in memory, of {shown.num_experts} a layer")
            axis.set_xticks(ceiling.capacities)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    drawn = io.BytesIO()
    suffix = path.suffix.lower().removeprefix(".")
    figure.savefig(drawn, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    write_whole(path, drawn.getvalue())


def _series(rows: Sequence[CompareRow], policy: str) -> Series:
    points = sorted((row for row in rows if row.policy == policy), key=lambda row: row.capacity)
    return Series(
        policy,
        tuple(row.capacity for row in points),
        tuple(100 * row.hit_rate for row in points),
        tuple(None if row.gap_closed is None else 100 * row.gap_closed for row in points),
    )


def _plain(text: str) -> str:
    """Letters that every font has, and no formula: `$` would begin one."""
    return text.encode("ascii", "replace").decode().replace("$", r"\$")


def _short(policy: str) -> str:
    """A policy's file without the way to it: a plot travels farther than the file."""
    name, colon, file = policy.partition(":")
    return name + colon + Path(file).name if colon else name
