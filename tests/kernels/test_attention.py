"""Attention of prompts in compiled code against PyTorch's, in every arrangement of blocks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pumice.config import DecoderConfig
from pumice.errors import WorkError
from pumice.kernels import attention, loader
from pumice.model.cache import KVCache, Segment


def outputs(
    monkeypatch: pytest.MonkeyPatch, config: DecoderConfig, segments: list[Segment], compiled: bool
) -> torch.Tensor:
    """Attention of random tokens: those before them first, then the segments' own."""
    generator = torch.Generator().manual_seed(0)
    if not compiled:
        monkeypatch.setattr(attention, "library", lambda: None)
    cache = KVCache(config, 1024, torch.device("cpu"), torch.bfloat16)
    earlier = [Segment(table, 0, past) for table, past, _ in segments if past]
    for step in [*([earlier] if earlier else []), segments]:
        count = sum(segment.new for segment in step)
        q, k, v = (
            torch.randn(1, count, heads, config.head_dim, generator=generator).transpose(1, 2)
            for heads in (config.heads, config.kv_heads, config.kv_heads)
        )
        mixed = cache.attend(step)(0, 4 * q, k, v)
    monkeypatch.undo()
    return mixed


@pytest.mark.parametrize("window", [None, 1, 70, 500])
@pytest.mark.parametrize(
    "segments",
    [
        [Segment([0, 1, 2, 3, 4], 0, 300)],
        [Segment([3, 1, 7], 0, 130)],
        [Segment([5, 9, 2, 4], 101, 137)],
        [Segment([6, 8], 63, 2), Segment([0, 1, 2], 10, 1), Segment([3, 4], 0, 7)],
    ],
    ids=["neighbours", "scattered", "after others", "several"],
)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (6, 2, 48), (2, 1, 128)])
def test_equals_pytorch(
    monkeypatch: pytest.MonkeyPatch,
    segments: list[Segment],
    window: int | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> None:
    if loader.compiled("packed")[0] is None:
        pytest.skip(loader.compiled("packed")[1])
    config = DecoderConfig(
        vocab_size=8, width=64, depth=1, heads=heads, kv_heads=kv_heads, head_dim=head_dim, mlp_width=64,
        context=1024, sliding_window=window,
    )  # fmt: skip
    result = outputs(monkeypatch, config, segments, compiled=True)
    expected = outputs(monkeypatch, config, segments, compiled=False)
    # Measured worst: 1.7e-6
    assert torch.allclose(result, expected, atol=1e-5), (result - expected).abs().max()


def test_a_query_does_not_depend_on_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in chunks gets the same numbers as in one piece."""
    config = DecoderConfig(
        vocab_size=8, width=64, depth=1, heads=2, kv_heads=2, head_dim=64, mlp_width=64, context=1024
    )
    q, k, v = (torch.randn(1, 2, 400, 64) for _ in range(3))
    results = []
    for cuts in ([400], [256, 144], [100, 299, 1]):
        cache, past, parts = KVCache(config, 1024, torch.device("cpu"), torch.bfloat16), 0, []
        for new in cuts:
            span = slice(past, past + new)
            step = [Segment(range(7), past, new)]
            parts.append(cache.attend(step)(0, q[:, :, span], k[:, :, span], v[:, :, span]))
            past += new
        results.append(torch.cat(parts, 2)[:, :, :399])  # a single token takes PyTorch's way
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_without_memory_it_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "library", lambda: SimpleNamespace(pumice_attend=lambda *_: 1))
    cells = torch.zeros(2, 64, 16, dtype=torch.bfloat16)
    with pytest.raises(WorkError, match="no memory is left for the attention of 3 tokens"):
        attention.attend(torch.zeros(1, 2, 3, 16), cells, cells, [0], 64, 0, None)
