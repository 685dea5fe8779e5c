"""Compare results with the numbers that LLaVA's papers and model zoo publish (see benchmarks.yaml)."""

from __future__ import annotations

from typing import Any

from pumice.evaluate.task import DatasetSource, releases

PUBLISHED = tuple(dict.fromkeys(model for source in releases().values() for model in source.published))


def drift(source: DatasetSource, value: float, reference: str, *, comparable: bool) -> dict[str, Any]:
    """Return how far `value` is from the number of `reference`, and whether retraining explains that.

    comparable: the whole official split was scored; otherwise nothing is flagged. Empty without a number.
    """
    number = source.published.get(reference)
    if number is None:
        return {}
    difference = value - number
    comparable = comparable and not source.elsewhere
    return {
        "reference": reference,
        "published": number,
        "difference": round(difference, 4),
        "spread": source.spread,
        "drifted": bool(comparable and abs(difference) > source.spread),
        "comparable": comparable,
    }
