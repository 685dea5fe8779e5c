"""The kernel for sequences of different lengths is used only where all that it needs is there."""

from __future__ import annotations

import pytest
import torch

from pumice.model import varlen

CUDA = torch.device("cuda")


def test_the_kernel_needs_a_recent_gpu_16_bits_a_narrow_head_and_its_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = frozenset({"window_size", "enable_gqa", "seqused_k", "block_table"})
    built = "torch.backends.cuda.is_flash_attention_available"
    monkeypatch.setattr(built, lambda: True)
    monkeypatch.setattr(varlen, "is_recent", lambda device: True)
    monkeypatch.setattr(varlen, "_function", lambda: (print, arguments))
    assert varlen.can_attend(CUDA, torch.bfloat16, 128, paged=True)
    assert not varlen.can_attend(CUDA, torch.float32, 128)
    assert not varlen.can_attend(CUDA, torch.bfloat16, 512)
    assert not varlen.can_attend(CUDA, torch.bfloat16, 36)
    assert not varlen.can_attend(torch.device("cpu"), torch.bfloat16, 128)
    # PyTorch 2.10 has the function with other arguments, later ones with these and without a paged cache.
    monkeypatch.setattr(varlen, "_function", lambda: (print, arguments - {"block_table"}))
    assert varlen.can_attend(CUDA, torch.bfloat16, 128)
    assert not varlen.can_attend(CUDA, torch.bfloat16, 128, paged=True)
    monkeypatch.setattr(varlen, "_function", lambda: (print, frozenset({"is_causal"})))
    assert not varlen.can_attend(CUDA, torch.bfloat16, 128)
    monkeypatch.setattr(varlen, "_function", lambda: (print, arguments))
    monkeypatch.setattr(built, lambda: False)
    assert not varlen.can_attend(CUDA, torch.bfloat16, 128)
    monkeypatch.setattr(built, lambda: True)
    monkeypatch.setattr(varlen, "is_recent", lambda device: False)
    assert not varlen.can_attend(CUDA, torch.bfloat16, 128)
