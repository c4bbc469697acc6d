"""Mask rules: at most CAP entries kept in each aligned group of columns of a row, as the fast GPU layouts want it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sslc_common.errors import InputError

FREE = "free"
GROUPS = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class MaskRule:
    """At most `cap` entries kept in each aligned group of `group` columns of a row."""

    cap: int
    group: int

    def most(self, N: int, K: int) -> int:
        """Entries of a matrix [N, K] that can be kept: the rule's share, tails included."""
        return N * K * self.cap // self.group


def parse_rule(text: str) -> MaskRule | None:
    """The rule of "CAP:GROUP"; None for "free".

    Raises:
        InputError: it is neither.
    """
    if text == FREE:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or int(match[2]) not in GROUPS or not 0 < int(match[1]) <= int(match[2]):
        raise InputError(
            "The mask rule is unknown",
            got=repr(text),
            allowed=f"{FREE}, or CAP:GROUP with GROUP one of {', '.join(map(str, GROUPS))} and 0 < CAP ≤ GROUP",
            do="Try 32:64, at most 32 kept in each aligned 64 columns of a row",
        )
    return MaskRule(int(match[1]), int(match[2]))
