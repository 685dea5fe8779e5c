"""Compute BLEU, ROUGE-L, METEOR and SPICE of captions; CIDEr-D is in `cider`.

BLEU and ROUGE-L equal pycocoevalcap's on the same words (`ptb.tokenize`). METEOR and SPICE are computed by
pycocoevalcap, where it and Java are installed.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Sequence

from pumice.errors import install
from pumice.evaluate.metrics.cider import Gram, grams
from pumice.evaluate.metrics.ptb import tokenize

SMALL, TINY = 1e-9, 1e-15  # pycocoevalcap's guards against division by zero
BETA = 1.2  # weight of recall in ROUGE-L


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return [BLEU-1, ..., BLEU-4] of a corpus, 0 to 1 (Papineni et al., 2002).

    The length penalty compares each caption with the reference that is closest in length.
    """
    # 1. Count n-grams and lengths over the whole corpus; BLEU is no mean over captions.
    caption_length = reference_length = 0
    correct, total = [0] * 4, [0] * 4  # n-grams that a reference has, n-grams of the captions
    for caption, texts in zip(captions, references, strict=True):
        words, reference_words = tokenize(caption), [tokenize(text) for text in texts]
        caption_length += len(words)
        reference_length += min((abs(len(other) - len(words)), len(other)) for other in reference_words)[1]
        max_counts: Counter[Gram] = Counter()
        for other in reference_words:
            max_counts |= grams(other)
        for gram, count in grams(words).items():
            correct[len(gram) - 1] += min(count, max_counts[gram])
            total[len(gram) - 1] += count
    # 2. Multiply the precisions, and penalise captions that are shorter than the references.
    ratio = (caption_length + TINY) / (reference_length + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n in range(4):
        product *= (correct[n] + TINY) / (total[n] + SMALL)
        scores.append(product ** (1 / (n + 1)) * brevity)
    return scores


def rouge_l(caption: str, references: Sequence[str]) -> float:
    """Return ROUGE-L of one caption, 0 to 1, from the best precision and the best recall of any reference."""
    words = tokenize(caption) or [""]  # pycocoevalcap counts no words as one empty word
    reference_words = [tokenize(reference) or [""] for reference in references]
    common = [_longest_common(words, other) for other in reference_words]
    precision = max(c / len(words) for c in common)
    recall = max(c / len(other) for c, other in zip(common, reference_words, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        previous = row
        row = [0]
        for j, other in enumerate(b):
            row.append(previous[j] + 1 if word == other else max(previous[j + 1], row[j]))
    return row[-1]


def java_metrics(
    captions: Sequence[str], references: Sequence[Sequence[str]], *, spice: bool = False
) -> tuple[dict[str, float], list[str]]:
    """Return METEOR, with `spice` also SPICE, and notes on what failed.

    SPICE downloads models of hundreds of megabytes.
    """
    if shutil.which("java") is None:
        return {}, ["METEOR is left out: there is no Java here"]
    try:
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.spice.spice import Spice
    except ImportError:
        return {}, [f"METEOR is left out: pycocoevalcap is not installed ({install('metrics')})"]
    tokenized = {i: [" ".join(tokenize(caption))] for i, caption in enumerate(captions)}
    truth = {i: [" ".join(tokenize(text)) for text in texts] for i, texts in enumerate(references)}
    scores: dict[str, float] = {}
    notes: list[str] = []
    for name, scorer in (("METEOR", Meteor), *([("SPICE", Spice)] if spice else [])):
        try:
            scores[name] = 100 * float(scorer().compute_score(truth, tokenized)[0])
        except (OSError, ValueError, RuntimeError) as error:
            notes.append(f"{name} is left out: its Java program failed ({error})")
    return scores, notes
