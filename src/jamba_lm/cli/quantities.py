"""Bytes and token counts, as people write and read them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from jamba_lm.config_json import shown
from jamba_lm.errors import InputError

_BYTE_UNITS: Mapping[str, int] = {
    "": 1,
    "B": 1,
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)},
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)},
}
_TOKEN_UNITS: Mapping[str, int] = {"": 1, "K": 1024, "M": 1024**2}
# Of a whole run, where nobody means 1024: K and M are left out, since elsewhere they are of 1024.
_RUN_UNITS: Mapping[str, int] = {"": 1, "B": 10**9, "T": 10**12}
# Far beyond any machine, and far below what makes arithmetic slow.
_LIMIT = 2**60


def parse_bytes(text: str, option: str) -> int:
    """Read a size such as `80GiB`, `80GB` (a thousand million each) or plain bytes.

    >>> parse_bytes("1.5KiB", "--memory")
    1536

    Raises:
        InputError: not a size; `80G` is none, since nobody can say which it means.
    """
    return _parse(text, option, _BYTE_UNITS, "a size such as 80GiB (1024^3), 80GB (1000^3) or 512")


def parse_tokens(text: str, option: str) -> int:
    """Read a number of tokens such as `256K`, where K is 1024 as in the paper, or plain.

    >>> parse_tokens("256K", "--context")
    262144

    Raises:
        InputError: not a number of tokens, or none at all.
    """
    return _parse(text, option, _TOKEN_UNITS, "a number of tokens such as 256K (of 1024) or 5000")


def parse_run_tokens(text: str, option: str) -> int:
    """Read the tokens of a training run, such as `300B` or `1.5T`, of a thousand million each.

    >>> parse_run_tokens("1.5T", "--tokens")
    1500000000000

    Raises:
        InputError: not a number of tokens, or none at all.
    """
    expected = "a number of tokens such as 300B (10^9), 1.5T (10^12) or plain"
    return _parse(text, option, _RUN_UNITS, expected)


def _parse(text: str, option: str, units: Mapping[str, int], expected: str) -> int:
    match = re.fullmatch(r"([0-9]{1,20})(?:\.([0-9]{1,6}))? ?([A-Za-z]{0,3})", text.strip())
    by_lower_case = {unit.lower(): size for unit, size in units.items()}
    if match and match[3].lower() in by_lower_case:
        whole, decimals, unit = match[1], match[2] or "", match[3].lower()
        count, remainder = divmod(int(whole + decimals) * by_lower_case[unit], 10 ** len(decimals))
        if remainder == 0 and 1 <= count <= _LIMIT:
            return count
    raise InputError(f"{option} is {shown(text)}: expected {expected}")


def show_bytes(count: int) -> str:
    """Write a number of bytes with three or four figures, in binary units.

    >>> show_bytes(4 * 1024**3), show_bytes(1536), show_bytes(12)
    ('4.00 GiB', '1.50 KiB', '12 B')
    """
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.2f} {unit}"


def show_count(count: int, noun: str) -> str:
    """Write how many there are of something whose plural ends in s.

    >>> show_count(1, "thread"), show_count(1200, "thread")
    ('1 thread', '1,200 threads')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
