"""BLEU, ROUGE-L, METEOR and SPICE of captions; CIDEr-D is in `cider`.

BLEU and ROUGE-L equal pycocoevalcap's on the same words (`ptb.tokenize`). METEOR and SPICE are its own,
where it and Java are installed. Does not know: pictures, files.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Sequence

from pumice.evaluate.metrics.ptb import tokenize

SMALL, TINY = 1e-9, 1e-15  # pycocoevalcap's guards against division by zero
BETA = 1.2  # weight of recall in ROUGE-L


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """[BLEU-1, ..., BLEU-4] of a corpus, 0 to 1; of several references the one closest in length counts."""
    said = closest = 0
    right, total = [0] * 4, [0] * 4  # n-grams that a reference has, n-grams said
    for caption, texts in zip(captions, references, strict=True):
        words, others = tokenize(caption), [tokenize(text) for text in texts]
        said += len(words)
        closest += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        most: Counter[tuple[str, ...]] = Counter()
        for other in others:
            most |= _grams(other)
        for gram, count in _grams(words).items():
            right[len(gram) - 1] += min(count, most[gram])
            total[len(gram) - 1] += count
    ratio = (said + TINY) / (closest + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n in range(4):
        product *= (right[n] + TINY) / (total[n] + SMALL)
        scores.append(product ** (1 / (n + 1)) * brevity)
    return scores


def _grams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def rouge_l(caption: str, references: Sequence[str]) -> float:
    """ROUGE-L of one caption, 0 to 1: the best precision and the best recall of any reference."""
    words = tokenize(caption) or [""]  # no words are one empty word there
    others = [tokenize(reference) or [""] for reference in references]
    common = [_longest_common(words, other) for other in others]
    precision = max(c / len(words) for c in common)
    recall = max(c / len(other) for c, other in zip(common, others, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        before = row
        row = [0]
        for j, other in enumerate(b):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
    return row[-1]


def java_metrics(
    captions: Sequence[str], references: Sequence[Sequence[str]], *, spice: bool = False
) -> tuple[dict[str, float], list[str]]:
    """METEOR, and SPICE if wanted (it fetches models of hundreds of megabytes), or notes why not."""
    if shutil.which("java") is None:
        return {}, ["METEOR is left out: there is no Java here"]
    try:
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.spice.spice import Spice
    except ImportError:
        return {}, ["METEOR is left out: pycocoevalcap is not installed (pip install 'pumice[metrics]')"]
    said = {i: [" ".join(tokenize(caption))] for i, caption in enumerate(captions)}
    truth = {i: [" ".join(tokenize(text)) for text in texts] for i, texts in enumerate(references)}
    scores: dict[str, float] = {}
    notes: list[str] = []
    for name, scorer in (("METEOR", Meteor), *([("SPICE", Spice)] if spice else [])):
        try:
            scores[name] = 100 * float(scorer().compute_score(truth, said)[0])
        except (OSError, ValueError, RuntimeError) as error:
            notes.append(f"{name} is left out: its Java program failed ({error})")
    return scores, notes
