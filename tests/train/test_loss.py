"""The chunked loss equals the plain one, value and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pumice.train import loss as module
from pumice.train.loss import supervised_loss


@pytest.mark.parametrize("head_learns", [False, True])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_equals_cross_entropy_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, chunk: int, head_learns: bool
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(9, 16, dtype=torch.float64, requires_grad=True)
    head = torch.randn(40, 16, dtype=torch.float64, requires_grad=head_learns)
    sources = torch.tensor([0, 0, 3, 4, 5, 5, 8])  # one state may predict several tokens
    targets = torch.tensor([1, 2, 39, 0, 7, 7, 20])
    weights = torch.tensor([1.0, 2, 1, 1, 3, 1, 1])

    actual = supervised_loss(hidden[sources], head, targets, weights) / weights.sum()
    actual.backward()
    grads = [hidden.grad, head.grad]
    hidden.grad = head.grad = None
    logits = hidden[sources] @ head.T
    plain = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
    plain.backward()

    # logits pass through fp32: measured worst case 5e-8
    torch.testing.assert_close(actual.double(), plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads[0], hidden.grad, rtol=1e-5, atol=1e-6)
    if head_learns:
        torch.testing.assert_close(grads[1], head.grad, rtol=1e-5, atol=1e-6)
    else:
        assert grads[1] is None
