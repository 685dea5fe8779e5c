"""How attention by layer and head becomes one weight per image token: one table of named methods.

Knows: arrays that a pass recorded. Does not know: models, words, pixels.

Shapes: n tokens of the answer, L layers, H heads, N image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pumice.errors import InputError
from pumice.explain.attention import Looks

# Relative depth of the layers whose heat lay most on the thing named, chosen on 45 composites that the table
# in docs/explaining.md does not count.
BEST_DEPTH = (0.4, 0.8)


@dataclass(frozen=True)
class Method:
    """weigh: what was recorded and the chosen layers -> (n, N), not yet normalised."""

    title: str
    text: str
    weigh: Callable[[Looks, Sequence[int]], np.ndarray]
    best_layers: bool = False  # of all layers, only those of BEST_DEPTH, unless somebody chooses
    rollout: bool = False  # needs the rollout, which costs every position's attention
    gradient: bool = False  # needs the gradients, which cost one pass backwards over the answer
    layered: bool = True  # layers can be chosen


def _mean(looks: Looks, layers: Sequence[int]) -> np.ndarray:
    return looks.attention[:, list(layers)].mean((1, 2)).numpy()


def _rollout(looks: Looks, layers: Sequence[int]) -> np.ndarray:
    assert looks.rollout is not None
    return looks.rollout.numpy()


def _gradient(looks: Looks, layers: Sequence[int]) -> np.ndarray:
    assert looks.gradient is not None
    return looks.gradient[:, list(layers)].mean(1).numpy()


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
    """Raises InputError when there is none of this name."""
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; use one of {', '.join(METHODS)}")
    return METHODS[name]


def choose_layers(method: Method, depth: int, wanted: Sequence[int] | None) -> list[int]:
    """The layers that a method looks at, of `depth`. InputError on one that the decoder does not have."""
    if wanted is None:
        low, high = BEST_DEPTH if method.best_layers else (0.0, 1.0)
        first = min(int(low * depth), depth - 1)
        return list(range(first, max(first + 1, int(high * depth))))
    if not method.layered:
        raise InputError(
            f"the method {method.title!r} goes through all layers; leave out the choice of layers"
        )
    if isinstance(wanted, str) or not isinstance(wanted, Sequence) or {type(n) for n in wanted} - {int}:
        raise InputError(f"the layers are {wanted!r}; give numbers from 0, such as [3, 4] or range(12, 24)")
    layers = sorted(set(wanted))
    if not layers or layers[0] < 0 or layers[-1] >= depth:
        outside = [n for n in (*layers[:1], *layers[-1:]) if not 0 <= n < depth]
        chosen = f"layer {outside[-1]} was" if outside else "no layers were"
        raise InputError(f"{chosen} chosen, the decoder has layers 0 to {depth - 1}")
    return layers
