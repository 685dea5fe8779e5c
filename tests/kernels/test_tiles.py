"""Attention of tiles in compiled code against PyTorch's in 64 bits."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.errors import WorkError
from pumice.kernels import attention, loader
from pumice.kernels.attention import attend_tiles

# The relative error that the rounding of the products of each kernel may cause.
BOUNDS = {"packed": 1e-2, "plain": 5e-6}


@pytest.fixture(params=BOUNDS)
def bound(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    """Make `attend_tiles` use this library, and return its bound."""
    code, reason = loader.compiled(request.param)
    if code is None:
        pytest.skip(reason)
    monkeypatch.setattr(attention, "library", lambda: code)
    yield BOUNDS[request.param]


def random(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


# One patch; partial panels of keys; heads that are no whole vectors; several tiles.
@pytest.mark.parametrize(
    ("tiles", "patches", "heads", "size"),
    [(1, 1, 1, 8), (2, 50, 2, 64), (1, 131, 3, 72), (3, 7, 2, 20), (1, 64, 1, 144), (1, 13, 1, 5)],
)
@pytest.mark.parametrize("factor", [1.0, 30.0])  # 30: a patch sees hardly more than one other
def test_equals_pytorch(bound: float, tiles: int, patches: int, heads: int, size: int, factor: float) -> None:
    q, k, v = random(tiles, patches, heads * size)
    y = attend_tiles(factor * q, k, v, heads)
    split = [x.double().unflatten(2, (heads, size)).transpose(1, 2) for x in (factor * q, k, v)]
    expected = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    assert y.shape == expected.shape
    # Sharp attention multiplies the rounding of scores.
    assert (y - expected).norm() <= bound * max(1.0, factor / 3) * expected.norm()


def test_a_number_that_is_none_is_not_hidden(bound: float) -> None:
    q, k, v = random(1, 50, 2 * 32)
    k.view(torch.int32)[0, 7, 3] = 0x7FC00001  # NaN in the first head
    y = attend_tiles(q, k, v, 2)
    assert y[..., :32].isnan().all() and not y[..., 32:].isnan().any()


def test_a_tile_and_a_patch_do_not_depend_on_others_or_on_threads(
    bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = random(3, 70, 4 * 32)
    together = attend_tiles(q, k, v, 4)
    alone = [attend_tiles(*(x[n : n + 1] for x in (q, k, v)), 4) for n in range(3)]
    assert torch.equal(together, torch.cat(alone))
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    assert torch.equal(attend_tiles(q[:, order], k, v, 4), together[:, order])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(attend_tiles(q, k, v, 4), together)


def test_shapes_and_types_that_do_not_fit_are_refused(bound: float) -> None:
    q, k, v = random(1, 6, 32)
    for other in (q[:, :5], q.half(), q[..., :16]):
        with pytest.raises(ValueError, match=r"expected three tensors \(B, T, 2 \* d\) of fp32"):
            attend_tiles(q, k, other, 2)
    with pytest.raises(ValueError, match="expected three tensors"):
        attend_tiles(q, k, v, 3)


def test_without_memory_it_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "library", lambda: SimpleNamespace(pumice_attend_tiles=lambda *_: 1))
    with pytest.raises(WorkError, match="no memory is left for the attention of 6 patches"):
        attend_tiles(*random(1, 6, 32), 2)
