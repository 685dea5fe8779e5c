"""The methods that turn attention by layer and head into one weight per image token.

Shapes: n tokens of the answer, L layers, H heads, N image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pumice.errors import InputError, check_known
from pumice.explain.attention import AttentionRecord

# Relative depth of the layers whose heat lies most on the named thing. Chosen on 45 composites that are not
# in the table of docs/measurements/explaining.md.
BEST_DEPTH = (0.4, 0.8)


@dataclass(frozen=True)
class Method:
    """weigh: turns a record and the chosen layers into weights (n, N), not yet normalised."""

    title: str
    text: str
    weigh: Callable[[AttentionRecord, Sequence[int]], np.ndarray]
    best_layers: bool = False  # use the layers of BEST_DEPTH, unless the caller chooses
    rollout: bool = False  # needs the rollout, which computes all rows of attention
    gradient: bool = False  # needs the gradients, which cost a backward pass over the answer
    layered: bool = True  # the caller may choose layers


def _mean(record: AttentionRecord, layers: Sequence[int]) -> np.ndarray:
    return record.attention[:, list(layers)].mean((1, 2)).numpy()


def _rollout(record: AttentionRecord, layers: Sequence[int]) -> np.ndarray:
    assert record.rollout is not None
    return record.rollout.numpy()


def _gradient(record: AttentionRecord, layers: Sequence[int]) -> np.ndarray:
    assert record.gradient is not None
    return record.gradient[:, list(layers)].mean(1).numpy()


METHODS = {
    "mean": Method(
        "mean attention", "Attention from the word's position, the mean over all layers and heads.", _mean
    ),
    "best-layers": Method(
        "attention of the best layers",
        "Attention from the word's position, the mean over the heads of the layers between 40% and 80% of "
        "the depth.",
        _mean,
        best_layers=True,
    ),
    "rollout": Method(
        "attention rollout",
        "Attention multiplied through all layers, half of each position kept by the residual stream "
        "(arXiv 2005.00928).",
        _rollout,
        rollout=True,
        layered=False,
    ),
    "gradient": Method(
        "gradient-weighted attention",
        "Attention times the gradient of the word's log-probability to it, where that is positive: what made "
        "the word likelier, the mean over all layers and heads (arXiv 2103.15679).",
        _gradient,
        gradient=True,
    ),
    "gradient-best-layers": Method(
        "gradient-weighted attention of the best layers",
        "Attention times the gradient of the word's log-probability to it, where that is positive: what made "
        "the word likelier, the mean over the heads of the layers between 40% and 80% of the depth.",
        _gradient,
        best_layers=True,
        gradient=True,
    ),
}
DEFAULT = "gradient-best-layers"


def get_method(name: str) -> Method:
    """Return the method of this name. Raises InputError if there is none."""
    check_known(name, METHODS, f"unknown method {name!r}")
    return METHODS[name]


def choose_layers(method: Method, depth: int, requested: Sequence[int] | None) -> list[int]:
    """Return the layers that a method uses, of `depth`. Raises InputError if one does not exist."""
    if requested is None:
        low, high = BEST_DEPTH if method.best_layers else (0.0, 1.0)
        first = min(int(low * depth), depth - 1)
        return list(range(first, max(first + 1, int(high * depth))))
    if not method.layered:
        raise InputError(
            f"the method {method.title!r} goes through all layers; leave out the choice of layers"
        )
    if not isinstance(requested, Sequence) or {type(n) for n in requested} - {int}:
        raise InputError(
            f"the layers are {requested!r}; give numbers from 0, such as [3, 4] or range(12, 24)"
        )
    layers = sorted(set(requested))
    if not layers or layers[0] < 0 or layers[-1] >= depth:
        outside = [n for n in (*layers[:1], *layers[-1:]) if not 0 <= n < depth]
        chosen = f"layer {outside[-1]} was" if outside else "no layers were"
        raise InputError(f"{chosen} chosen, the decoder has layers 0 to {depth - 1}")
    return layers
