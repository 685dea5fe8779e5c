"""Try a module of a user's own on zeros, so that wrong shapes are told before anything is computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pumice.errors import InputError


@torch.no_grad()
def try_shapes(
    name: str,
    build: Callable[[], nn.Module],
    given: tuple[int, ...],
    expected: tuple[str, int, int],
    width: str,
) -> None:
    """Raise InputError unless a module gives (1, count, width) for zeros of the shape `given`.

    name: of the module, for messages. expected: what is counted ("features"), their number, and their width.
    width: the words before the right width in a message, "the LLM has".
    """

    def trial(device: str) -> tuple[int, ...]:
        # A run draws its weights from the same generator: leave its state alone.
        with torch.random.fork_rng(devices=[]), torch.device(device):
            return tuple(build().eval()(torch.zeros(given)).shape)

    # Modules that look at values, or bring weights of their own, run only with values.
    for device in ("meta", "cpu"):
        try:
            shape = trial(device)
            break
        except InputError:
            raise
        except Exception as error:  # what modules of users' own raise is not limited
            failure = error
    else:
        raise InputError(f"{name} fails on an input of shape {given} ({failure}); correct it") from failure
    what, count, size = expected
    if len(shape) != 3 or shape[0] != 1:
        raise InputError(f"{name} gives a tensor of shape {shape}, not (tiles, {what}, width); correct it")
    if shape[1] != count:
        raise InputError(f"{name} gives {shape[1]} {what} of a tile, {count} are counted; correct it")
    if shape[2] != size:
        raise InputError(f"{name} gives {what} of width {shape[2]}, {width} {size}; correct it")
