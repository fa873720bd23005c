"""Personal data in a text, replaced by words that say what stood there.

Patterns, not understanding: names and addresses stay. Knows no files.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Sequence

# Local part and domain as people write them, not all of RFC 5322. Bounded, so that a page of one
# word costs no time.
_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}"
    r"[A-Za-z]{2,24}(?![\w-])"
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-]|\.\d)")
# A plus and a country, or North American groups: digits alone are too often something else.
_PHONE = re.compile(
    r"(?<![\w.+-])(?:\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,5}|\(?\d{3}\)?[ .-]\d{3}[.-]\d{4})(?![\w-])"
)


# All that has been given out of IPv6; `a::b` of a C++ program is an address, too, but nobody's.
_GIVEN_OUT = ipaddress.ip_network("2000::/3")


def _is_public(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global and (address.version == 4 or address in _GIVEN_OUT)


def _is_card(text: str) -> bool:
    """Luhn's check, which one number of ten passes by chance."""
    digits = [int(one) for one in text if one.isdigit()]
    if len(set(digits)) == 1:
        return False
    doubled = [2 * one - 9 * (one > 4) for one in digits[-2::-2]]
    return (sum(digits[::-2]) + sum(doubled)) % 10 == 0


def _always(_: str) -> bool:
    return True


_RULES: dict[str, tuple[tuple[re.Pattern[str], Callable[[str], bool]], ...]] = {
    "email": ((_EMAIL, _always),),
    "ip": ((_IPV4, _is_public), (_IPV6, _is_public)),
    "card": ((_CARD, _is_card),),
    "phone": ((_PHONE, _always),),
}
MASKS = {"email": "<EMAIL>", "ip": "<IP>", "card": "<CARD>", "phone": "<PHONE>"}


class PiiStage:
    """Masks the kinds it was made with.

    Attributes:
        counts: how many of each kind were masked.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self.counts: Counter[str] = Counter()
        # Cards before telephones: a card's groups look like one.
        self._kinds = [kind for kind in _RULES if kind in kinds]

    def apply(self, text: str) -> str:
        """Return `text` with what was found masked; what is masked already stays as it is.

        >>> PiiStage(["email", "ip"]).apply("Ask jo.doe@mail.org at 8.8.8.8, not at 127.0.0.1.")
        'Ask <EMAIL> at <IP>, not at 127.0.0.1.'
        """
        for kind in self._kinds:
            for pattern, is_one in _RULES[kind]:
                text = self._masked(text, kind, pattern, is_one)
        return text

    def _masked(
        self, text: str, kind: str, pattern: re.Pattern[str], is_one: Callable[[str], bool]
    ) -> str:
        def mask(match: re.Match[str]) -> str:
            if not is_one(match[0]):
                return match[0]
            self.counts[kind] += 1
            return MASKS[kind]

        return pattern.sub(mask, text)
