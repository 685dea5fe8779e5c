"""List the numbers that LLaVA's papers and model zoo publish, and measure a result's drift from them.

Source: arXiv 2310.03744, tables 3 and 4, and haotian-liu/LLaVA's model zoo.
"""

from __future__ import annotations

from typing import Any

PUBLISHED: dict[str, dict[str, float]] = {
    "LLaVA-1.5-7B": {
        "vqav2": 78.5, "gqa": 62.0, "vizwiz": 50.0, "scienceqa": 66.8, "textvqa": 58.2, "pope": 85.9,
        "mme": 1510.7, "mmbench": 64.3, "mmbench-cn": 58.3, "seed": 58.6, "llava-bench": 65.4, "mmvet": 31.1,
    },
    "LLaVA-1.5-13B": {
        "vqav2": 80.0, "gqa": 63.3, "vizwiz": 53.6, "scienceqa": 71.6, "textvqa": 61.3, "pope": 85.9,
        "mme": 1531.3, "mmbench": 67.7, "mmbench-cn": 63.6, "seed": 61.6, "llava-bench": 72.5, "mmvet": 36.1,
    },
}  # fmt: skip
# The split behind a published number, where it has no public answers and cannot be scored locally.
ELSEWHERE = {
    "vqav2": "test-dev on EvalAI",
    "vizwiz": "test on EvalAI",
}
# How much a number changes when LLaVA-1.5 is trained again (MME: about 20, from its issue tracker) or graded
# by another judge. A checkpoint of LLaVA's own that differs by more has drifted.
SPREAD = {"mme": 20.0, "llava-bench": 5.0, "mmvet": 2.0}
USUAL_SPREAD = 1.0
SCALE = {"mme": 2000.0}  # the largest possible headline, where it is not 100


def published(task: str) -> dict[str, float]:
    """Return the published number of each model that has one for the task."""
    return {model: numbers[task] for model, numbers in PUBLISHED.items() if task in numbers}


def drift(task: str, value: float, reference: str, *, comparable: bool) -> dict[str, Any]:
    """Return how far `value` is from the number of `reference`, and whether retraining explains that.

    comparable: the whole official split was scored; otherwise nothing is flagged. Empty without a number.
    """
    number = published(task).get(reference)
    if number is None:
        return {}
    spread = SPREAD.get(task, USUAL_SPREAD)
    difference = value - number
    return {
        "reference": reference,
        "published": number,
        "difference": round(difference, 4),
        "spread": spread,
        "drifted": bool(comparable and task not in ELSEWHERE and abs(difference) > spread),
        "comparable": comparable and task not in ELSEWHERE,
    }
