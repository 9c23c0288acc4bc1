"""Fiddler's choice: what the cost model says, by hand, and that the constants are measured."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.config import CPU_EXPERTS
from flashmoe.copy_engine import HostCopyEngine
from flashmoe.expert_placement import Placement, calibrate
from kernels.expert_slots import slot_layout
from kernels.native import Activation, Experts, Format, make_context


def test_a_slow_cpu_gets_nothing_and_a_fast_one_its_share() -> None:
    assert Placement("auto", copy_s=1.0, cpu_s=9.0, round_trip_s=0.0).on_cpu(8) == 0
    assert Placement("auto", copy_s=1.0, cpu_s=1.0, round_trip_s=0.0).on_cpu(8) == 4
    assert Placement("auto", copy_s=3.0, cpu_s=1.0, round_trip_s=0.0).on_cpu(8) == 6  # 2 copies as long as 6
    assert Placement("auto", copy_s=1.0, cpu_s=0.1, round_trip_s=2.5).on_cpu(2) == 0  # not worth the trip


def test_of_equally_good_choices_the_one_with_most_copies_is_taken() -> None:
    assert Placement("auto", copy_s=1.0, cpu_s=2.0, round_trip_s=0.0).on_cpu(2) == 0


def test_never_and_always_ask_no_model() -> None:
    assert Placement("never", copy_s=9.0).on_cpu(8) == 0
    assert Placement("always", cpu_s=9.0).on_cpu(8) == 8


@given(st.integers(0, 16), st.floats(1e-6, 1.0), st.floats(1e-6, 1.0), st.floats(0.0, 1.0))
def test_no_other_share_ends_earlier(misses: int, copy_s: float, cpu_s: float, trip_s: float) -> None:
    placement = Placement("auto", copy_s, cpu_s, trip_s)
    ends = [max(placement.queues_s(misses - n, n)) for n in range(misses + 1)]
    assert ends[placement.on_cpu(misses)] == min(ends)


@pytest.mark.parametrize("format", [Format.INT4, Format.BF16])
@pytest.mark.parametrize("mode", CPU_EXPERTS)
def test_calibration_measures_both_ways_with_real_experts(format: Format, mode: str) -> None:
    hidden, width, top_k = 128, 64, 2
    layout = slot_layout(format.name.lower(), hidden, width)
    engine = HostCopyEngine(torch.zeros(4, layout.bytes, dtype=torch.uint8), layout)
    experts = Experts(hidden, width, format, Activation.SILU, False)
    placement = calibrate(mode, engine, make_context(1), experts, hidden, top_k)
    assert placement.mode == mode
    measured = placement.copy_s > 0 and placement.cpu_s > 0
    assert measured == (mode != "never")
