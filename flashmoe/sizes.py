"""Sizes of memory as people write and read them. RAM is binary: 16G is 16 x 2**30 bytes, printed as 16.0 GiB.

Knows nothing about models or about where memory is free; the caller says how much is.
"""

import re
from decimal import Decimal

from flashmoe.errors import BudgetError

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(%|[KMGT](?:i|iB|B)?|B)?", re.IGNORECASE | re.ASCII)
_UNITS = "KMGT"
_EXAMPLE = "write it like 16G, 2.5GiB, 16GB, 80% or auto"
_LONGEST_TEXT = 32
LARGEST_SIZE = 2**50  # 1 PiB: no one machine has it, so it must be a slip

AUTO_HEADROOM_BYTES = 512 * 2**20
AUTO_HEADROOM_SHARE = 0.10


def parse_size(text: str, *, free_bytes: int | None) -> int:
    """The bytes that `text` asks for.

    `16G`, `16g`, `16Gi`, `16GiB`: 2**30 based. `16GB`: 10**9 based. K, M and T alike; `2.5G`, plain bytes.
    `80%`: of `free_bytes`. `auto`: all of `free_bytes` but the larger of 512 MiB and 10 %.
    Raises BudgetError for anything else, for nothing and for more than 1 PiB; also for `80%` and `auto` where
    `free_bytes` is None, because the system does not tell.
    """
    word = text.strip()
    if word.lower() == "auto":
        return _all_but_headroom(_known(free_bytes, word))
    match = _SIZE.fullmatch(word) if len(word) <= _LONGEST_TEXT else None
    if match is None:
        raise BudgetError(f"{_shown(word)} is not a size; {_EXAMPLE}")
    number, unit = Decimal(match[1]), match[2] or "B"
    if unit == "%":
        if number > 100:
            raise BudgetError(f"{word} is more than what is free; {_EXAMPLE}")
        size = int(number * _known(free_bytes, word) / 100)
    else:
        size = int(number * _bytes_in(unit))
    if not 0 < size <= LARGEST_SIZE:
        raise BudgetError(f"{word} is {'less than one byte' if size < 1 else 'over 1 PiB'}; {_EXAMPLE}")
    return size


def format_bytes(n: int) -> str:
    """`n` in the largest binary unit that it fills: "5.3 GiB", "512 B"."""
    if abs(n) < 1024:
        return f"{n} B"
    size = float(n)
    for unit in _UNITS:
        size /= 1024
        if abs(round(size, 1)) < 1024 or unit == _UNITS[-1]:
            break
    return f"{size:.1f} {unit}iB"


def _bytes_in(unit: str) -> int:
    """16GB is what drive makers mean by it; everything else is binary."""
    unit = unit.upper()
    if unit == "B":
        return 1
    base = 1000 if unit.endswith("B") and "I" not in unit else 1024
    return int(base ** (_UNITS.index(unit[0]) + 1))


def _all_but_headroom(free_bytes: int) -> int:
    headroom = max(AUTO_HEADROOM_BYTES, int(free_bytes * AUTO_HEADROOM_SHARE))
    if free_bytes <= headroom:
        raise BudgetError(
            f"auto leaves {format_bytes(headroom)} to the system, but only {format_bytes(free_bytes)}"
            " are free; end other programs or give a size such as 2G"
        )
    return free_bytes - headroom


def _known(free_bytes: int | None, word: str) -> int:
    if free_bytes is None:
        raise BudgetError(
            f"{word} needs to know how much memory is free, and this system does not tell;"
            " give a size such as 16G"
        )
    return free_bytes


def _shown(word: str) -> str:
    return repr(word if len(word) <= _LONGEST_TEXT else word[: _LONGEST_TEXT - 3] + "...")
