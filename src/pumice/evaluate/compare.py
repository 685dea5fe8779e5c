"""Two sets of answers to the same questions: how far apart, and whether that could be chance.

Knows: scores. Does not know: how answers were made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pumice.errors import InputError
from pumice.evaluate.metrics.bootstrap import draws, mcnemar
from pumice.evaluate.task import Answered, Task, mean_statistic

SAMPLES = 1000


def compare(
    task: Task,
    first: Sequence[Answered],
    second: Sequence[Answered],
    names: tuple[str, str],
    files: tuple[str, str],
) -> dict[str, Any]:
    """The difference of the headlines (first minus second) with interval and p of the paired bootstrap.

    Pictures are resampled, the same for both. better, worse: of the first's answers. Where every answer is
    right or wrong, McNemar's exact test is beside it. Raises InputError when the questions differ.
    """
    ids = [question.id for question, _ in first]
    if ids != [question.id for question, _ in second]:
        raise InputError(
            f"{files[0]} answers {len(first)} questions and {files[1]} {len(second)}, not the same ones; "
            "compare answers to the same questions"
        )
    scores = task.score(first), task.score(second)
    statistics = [score.statistic or mean_statistic(score.values) for score in scores]
    ones = np.ones(len(ids))
    values = [statistic(ones) for statistic in statistics]
    groups = [question.group for question, _ in first]
    found = [
        statistics[0](weights) - statistics[1](weights)
        for weights in (draws(groups, SAMPLES, 0) if len(set(groups)) > 1 else ())
    ]
    differences = np.array([value for value in found if math.isfinite(value)])
    pairs = list(zip(scores[0].values, scores[1].values, strict=True))
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    result: dict[str, Any] = {
        "task": task.name,
        "title": task.title,
        "models": list(names),
        "files": list(files),
        "headline": task.headline,
        "values": [round(value, 6) for value in values],
        "difference": round(values[0] - values[1], 6),
        "lower_is_better": task.lower_is_better,
        "interval": None,
        "p": None,
        "questions": len(ids),
        "better": sum(a > b for a, b in both),
        "worse": sum(a < b for a, b in both),
        "mcnemar": None,
    }
    if len(differences):
        low, high = np.quantile(differences, [0.025, 0.975])
        tail = min(float((differences <= 0).mean()), float((differences >= 0).mean()))
        result["interval"] = [round(float(low), 6), round(float(high), 6)]
        # No p below what so many samples can show.
        result["p"] = min(1.0, max(2 * tail, 1 / len(differences)))
    if both and all(value in (0.0, 1.0) for pair in both for value in pair):
        result["mcnemar"] = mcnemar([a == 1 for a, _ in both], [b == 1 for _, b in both])
    return result


def verdict(found: Mapping[str, Any]) -> str:
    """Whose gain it is: "good.jsonl is 90.00 points better than poor.jsonl (36 answers better, 0 worse)"."""
    names, better, worse = list(found["files"]), found["better"], found["worse"]
    gain = -found["difference"] if found["lower_is_better"] else found["difference"]
    if gain < 0:
        names.reverse()
        better, worse = worse, better
    how = f"{abs(gain):.2f} points better than" if gain else "as good as"
    counted = f"{better} answer{'' if better == 1 else 's'} better, {worse} worse"
    return f"{names[0]} is {how} {names[1]} ({counted})"


def in_words(found: Mapping[str, Any]) -> str:
    """The comparison for the terminal: whose gain it is, both headlines, and whether it could be chance."""
    a, b = found["models"]
    lines = [
        f"{found['title']}: {verdict(found)}",
        f"  {found['headline']} {found['values'][0]:.2f} ({a}), {found['values'][1]:.2f} ({b}), "
        f"of {found['questions']} questions",
    ]
    if found["interval"]:
        low, high = found["interval"]
        lines.append(
            f"  {a} minus {b}: {found['difference']:+.2f}, 95% [{low:+.2f}, {high:+.2f}], "
            f"p {found['p']:.3g} (paired bootstrap over pictures)"
        )
    if found["mcnemar"] is not None:
        lines.append(f"  McNemar's exact test: p {found['mcnemar']:.3g}")
    return "\n".join(lines)
