"""Memory sizes as people write them, and as we print them."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.errors import BudgetError
from flashmoe.sizes import LARGEST_SIZE, format_bytes, parse_size

GIB = 2**30


@pytest.mark.parametrize(
    "text", ["16G", "16g", "16Gi", "16GiB", "16gib", " 16 GiB ", "16.0G", "17179869184", "17179869184B"]
)
def test_a_bare_letter_and_an_i_mean_powers_of_two(text: str) -> None:
    assert parse_size(text, free_bytes=None) == 16 * GIB


@pytest.mark.parametrize("text", ["16GB", "16gb", "16000MB", "0.016TB"])
def test_gb_means_powers_of_ten(text: str) -> None:
    assert parse_size(text, free_bytes=None) == 16 * 10**9


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1K", 2**10),
        ("1KiB", 2**10),
        ("1KB", 10**3),
        ("3M", 3 * 2**20),
        ("2T", 2**41),
        ("2.5G", 5 * 2**29),
        (".5G", 2**29),
    ],
)
def test_other_units_and_decimals_work_alike(text: str, size: int) -> None:
    assert parse_size(text, free_bytes=None) == size


def test_a_decimal_is_exact_and_rounds_down_to_whole_bytes() -> None:
    assert parse_size("0.1GB", free_bytes=None) == 10**8
    assert parse_size("0.1G", free_bytes=None) == 107374182  # .4


def test_a_percentage_is_of_what_is_free() -> None:
    assert parse_size("80%", free_bytes=10 * GIB) == 8 * GIB
    assert parse_size("12.5 %", free_bytes=16) == 2
    assert parse_size("100%", free_bytes=7) == 7


def test_auto_leaves_a_tenth_or_half_a_gib_to_the_system() -> None:
    assert parse_size("auto", free_bytes=100 * 10**9) == 90 * 10**9
    assert parse_size("AUTO", free_bytes=2 * GIB) == 2 * GIB - 512 * 2**20


@pytest.mark.parametrize("text", ["80%", "auto"])
def test_a_share_of_unknown_memory_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match=f"{text} needs to know how much memory is free.* such as 16G"):
        parse_size(text, free_bytes=None)


def test_auto_is_refused_where_hardly_anything_is_free() -> None:
    with pytest.raises(BudgetError, match=r"auto leaves 512\.0 MiB to .* only 300\.0 MiB are free"):
        parse_size("auto", free_bytes=300 * 2**20)


@pytest.mark.parametrize(
    "text",
    ["", "G", "lots", "16X", "16 16", "-4G", "+4G", "inf", "nan", "infG", "1e9", "0x10", "16iB", "1,5G"]
    + ["1_000", "5.G", "१६G", "1\u212a", "16G%", "101%", "-5%", "0G", "0.1B", "1025T", "9" * 10_000],
)
def test_nonsense_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BudgetError, match="write it like 16G, 2.5GiB, 16GB, 80% or auto") as refused:
        parse_size(text, free_bytes=GIB)
    assert len(str(refused.value)) < 150


@settings(deadline=None)
@given(st.text(max_size=12), st.one_of(st.none(), st.integers(0, 2**40)))
def test_any_text_is_a_size_within_bounds_or_refused(text: str, free_bytes: int | None) -> None:
    try:
        size = parse_size(text, free_bytes=free_bytes)
    except BudgetError:
        return
    assert 0 < size <= LARGEST_SIZE


@settings(deadline=None)
@given(st.integers(1, 2**50))
def test_what_is_printed_reads_back_within_a_rounding(n: int) -> None:
    assert parse_size(format_bytes(n), free_bytes=None) == pytest.approx(n, rel=0.05)


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024 * 1024 - 1, "1.0 MiB"),
        (int(5.3 * GIB), "5.3 GiB"),
        (16 * GIB, "16.0 GiB"),
        (2**50, "1024.0 TiB"),
        (-3 * GIB, "-3.0 GiB"),
    ],
)
def test_bytes_are_printed_in_the_largest_binary_unit_they_fill(n: int, text: str) -> None:
    assert format_bytes(n) == text


def test_reading_a_size_needs_no_torch() -> None:
    code = "import sys, flashmoe.sizes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
