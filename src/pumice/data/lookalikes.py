"""Find pictures that equal, or look like, others: held-out ones among those that are learned."""

from __future__ import annotations

import itertools

from pumice.data.images import Looks

_BITS = 64  # of a perceptual hash
_FEW = 4  # bits that the hashes of two versions of one picture may differ in
_ASPECT = 1.1  # their shapes may differ by this factor


class Lookalikes:
    """Pictures by what they look like, each with what to call it.

    Hashes that differ in at most `_FEW` bits agree in at least one of `_FEW` + 1 pieces. By these they are
    found.
    """

    def __init__(self) -> None:
        self._equal: dict[bytes, str] = {}
        self._pieces: list[dict[int, list[tuple[int, float, str]]]] = [{} for _ in range(_FEW + 1)]

    def add(self, looks: Looks, name: str) -> None:
        if looks.contents in self._equal:
            return
        self._equal[looks.contents] = name
        if looks.hash is None:
            return
        for pieces, piece in zip(self._pieces, _cut(looks.hash), strict=True):
            pieces.setdefault(piece, []).append((looks.hash, looks.aspect, name))

    def find(self, looks: Looks) -> tuple[str, str]:
        """Return ("is", name) of an equal picture, ("looks like", name) of a similar one, or ("", "")."""
        if looks.contents in self._equal:
            return "is", self._equal[looks.contents]
        if looks.hash is None:
            return "", ""
        for pieces, piece in zip(self._pieces, _cut(looks.hash), strict=True):
            for other, aspect, name in pieces.get(piece, ()):
                alike = (looks.hash ^ other).bit_count() <= _FEW
                if alike and 1 / _ASPECT <= looks.aspect / aspect <= _ASPECT:
                    return "looks like", name
        return "", ""


def _cut(value: int) -> list[int]:
    """Return the bits of a hash in `_FEW` + 1 pieces."""
    ends = [_BITS * n // (_FEW + 1) for n in range(_FEW + 2)]
    return [(value >> a) & ((1 << (b - a)) - 1) for a, b in itertools.pairwise(ends)]
