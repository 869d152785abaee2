"""Weight versions as strings that a server stores: a counter, the trainer, and whether an update is unfinished.

``"12"`` or ``"12@a1b2"`` is version 12 (written by trainer ``a1b2``); ``"dirty-13@a1b2"`` means that an update to 13
began and did not finish, so the server holds mixed weights. SGLang's start value ``"default"`` counts as version 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["FOREIGN", "WeightVersion", "version_number"]

FOREIGN = -1
"""The number of a version string that another program wrote in a form without a counter."""

_PATTERN = re.compile(r"(?P<dirty>dirty-)?(?P<number>[0-9]{1,18})(?:@(?P<owner>[0-9a-zA-Z_.-]+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightVersion:
    """A parsed weight version.

    Attributes:
        number: the counter; :data:`FOREIGN` for a string in another form.
        owner: id of the trainer that wrote it, or ``None``.
        dirty: an update to ``number`` began and did not finish.

    Examples:
        >>> WeightVersion.parse("default").number
        0
        >>> str(WeightVersion(number=13, owner="a1b2", dirty=True))
        'dirty-13@a1b2'
        >>> WeightVersion.parse("dirty-13@a1b2").dirty
        True
        >>> WeightVersion.parse("my-experiment").number
        -1
    """

    number: int
    owner: str | None = None
    dirty: bool = False

    @classmethod
    def parse(cls, text: str) -> WeightVersion:
        """Read a server's version string; never raises: an unknown form has number :data:`FOREIGN`."""
        return _parsed(text)

    def __str__(self) -> str:
        owner = f"@{self.owner}" if self.owner else ""
        return f"{'dirty-' if self.dirty else ''}{self.number}{owner}"


@lru_cache(maxsize=256)  # every answer names the few versions that servers hold
def _parsed(text: str) -> WeightVersion:
    if text == "default":
        return WeightVersion(number=0)
    match = _PATTERN.fullmatch(text)
    if match is None:
        return WeightVersion(number=FOREIGN, dirty=text.startswith("dirty-"))
    return WeightVersion(number=int(match["number"]), owner=match["owner"], dirty=match["dirty"] is not None)


def version_number(text: str) -> int:
    """The counter of a version string, e.g. 12 for ``"12@a1b2"``; :data:`FOREIGN` when it has none."""
    return WeightVersion.parse(text).number
