"""The loss of a pack: cross-entropy at supervised tokens only, in chunks, so that logits stay small.

Shapes: S supervised tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from pumice.model.layers import soft_cap

CHUNK = 256  # predictions whose logits exist at once: 256 x 49,152 x 4 bytes = 50 MB


class _ProjectedCrossEntropy(torch.autograd.Function):
    """The weighted sum of cross-entropies of hidden @ head.T, without all logits in memory at once.

    The forward pass computes the gradients too, chunk by chunk while the logits exist, as Liger-Kernel's
    fused linear cross-entropy does (arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, softcap: float | None
    ) -> Tensor:
        losses = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        # All logits (S, V) at once would be the largest tensor of the step, so compute them in chunks.
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            rows = hidden[part].to(head.dtype)
            logits = soft_cap((rows @ head.T).float(), softcap)
            slope = None if softcap is None else 1 - (logits / softcap) ** 2  # of the cap
            target_index = torch.arange(len(logits), device=logits.device), targets[part]
            log_norm = logits.logsumexp(-1)
            losses += ((log_norm - logits[target_index]) * weights[part]).sum()
            # The gradient of cross-entropy is softmax(logits) minus one-hot targets; it reuses the logits.
            grad = logits.sub_(log_norm[:, None]).exp_()
            grad[target_index] -= 1
            if slope is not None:
                grad *= slope
            grad = grad.to(head.dtype)
            grad_hidden[part] = (grad @ head) * weights[part, None]
            if grad_head is not None:
                grad_head += (grad.T @ (rows * weights[part, None]).to(head.dtype)).float()
        ctx.save_for_backward(grad_hidden, grad_head)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grads[0]
        head = None if grad_head is None else grad_head * scale
        return grad_hidden * scale, head, None, None, None


def supervised_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, softcap: float | None = None
) -> Tensor:
    """Return the weighted sum of a pack's cross-entropies, an fp32 scalar.

    hidden (S, D) predicts targets (S,); head (V, D); weights (S,). softcap: of the logits. The caller divides
    by the sum of weights over the whole step, so that every supervised token counts the same.
    """
    apply = cast(Callable[..., Tensor], _ProjectedCrossEntropy.apply)
    return apply(hidden, head, targets, weights, softcap)
