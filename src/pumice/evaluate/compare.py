"""Compare two models' answers to the same questions, and test whether the difference could be chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pumice.errors import InputError, counted
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
    """Return the difference of the headlines (first minus second), its interval and its p.

    The paired bootstrap resamples images, the same for both models. better, worse: how many of the first
    model's answers score higher or lower. Where every answer is right or wrong, the result also holds
    McNemar's exact test. Raises InputError when the questions differ.
    """
    # 1. Score both sets.
    ids = [question.id for question, _ in first]
    if ids != [question.id for question, _ in second]:
        raise InputError(
            f"{files[0]} answers {counted(len(first), 'question')} and {files[1]} {len(second)}, not the "
            "same ones; "
            "compare answers to the same questions"
        )
    scores = task.score(first), task.score(second)
    statistics = [score.statistic or mean_statistic(score.values) for score in scores]
    ones = np.ones(len(ids))
    values = [statistic(ones) for statistic in statistics]
    for value, file in zip(values, files, strict=True):
        if not math.isfinite(value):  # such as CHAIR of captions that name no object
            raise InputError(f"the answers in {file} give no {task.headline}; compare others")
    # 2. Resample both with the same weights: what is hard about an image then cancels out.
    groups = [question.group for question, _ in first]
    samples = [
        statistics[0](weights) - statistics[1](weights)
        for weights in (draws(groups, SAMPLES, 0) if len(set(groups)) > 1 else ())
    ]
    differences = np.array([value for value in samples if math.isfinite(value)])
    # 3. Count the questions on which the models differ.
    values_of_both = zip(scores[0].values, scores[1].values, strict=True)
    pairs = [(a, b) for a, b in values_of_both if a is not None and b is not None]
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
        "better": sum(a > b for a, b in pairs),
        "worse": sum(a < b for a, b in pairs),
        "mcnemar": None,
    }
    if len(differences):
        low, high = np.quantile(differences, [0.025, 0.975])
        tail = min(float((differences <= 0).mean()), float((differences >= 0).mean()))
        result["interval"] = [round(float(low), 6), round(float(high), 6)]
        # This number of samples cannot show a smaller p.
        result["p"] = min(1.0, max(2 * tail, 1 / len(differences)))
    if pairs and all(value in (0.0, 1.0) for pair in pairs for value in pair):
        result["mcnemar"] = mcnemar([a == 1 for a, _ in pairs], [b == 1 for _, b in pairs])
    return result


def verdict(comparison: Mapping[str, Any]) -> str:
    """Say which file is better: "a.jsonl is 9.00 points better than b.jsonl (3 answers better, 0 worse)"."""
    names, better, worse = list(comparison["files"]), comparison["better"], comparison["worse"]
    gain = -comparison["difference"] if comparison["lower_is_better"] else comparison["difference"]
    if gain < 0:
        names.reverse()
        better, worse = worse, better
    relation = f"{format_points(abs(gain))} points better than" if gain else "as good as"
    counts = f"{counted(better, 'answer')} better, {worse} worse"
    return f"{names[0]} is {relation} {names[1]} ({counts})"


def format_points(value: float, sign: str = "") -> str:
    """Return a value with two decimals, or with up to six if two would show 0. sign: "+" or nothing."""
    text = format(value, f"{sign}.2f")
    return text if float(text) or not value else format(value, f"{sign}.6f").rstrip("0")


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """Return a comparison as text for the terminal: the verdict, both headlines, interval and p."""
    a, b = comparison["models"]
    lines = [
        f"{comparison['title']}: {verdict(comparison)}",
        f"  {comparison['headline']} {comparison['values'][0]:.2f} ({a}), "
        f"{comparison['values'][1]:.2f} ({b}), of {counted(comparison['questions'], 'question')}",
    ]
    if comparison["interval"]:
        low, high = comparison["interval"]
        lines.append(
            f"  {a} minus {b}: {format_points(comparison['difference'], '+')}, "
            f"95% [{format_points(low, '+')}, {format_points(high, '+')}], "
            f"p {comparison['p']:.3g} (paired bootstrap over pictures)"
        )
    if comparison["mcnemar"] is not None:
        lines.append(f"  McNemar's exact test: p {comparison['mcnemar']:.3g}")
    return "\n".join(lines)
