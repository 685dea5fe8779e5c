"""Activation checkpointing: what a forward pass saves, and what the backward pass computes again."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from pumice.engine.snapshot import keeps_results

Kind = Literal["none", "selective", "full"]

# Matrix products and attention: expensive to compute again, cheap to save.
_SAVED_OPS = {
    "mm", "addmm", "bmm", "linear", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_varlen_attn", "_flash_attention_forward",
}  # fmt: skip


def checkpoint_blocks(blocks: Iterable[nn.Module], kind: Kind) -> None:
    """Make each block save less for its backward pass. The results do not change, also with dropout.

    full: save the block's input only and run the block twice, for a third more compute. selective: save the
    outputs of matrix products and attention, and compute the cheap operations between them twice.
    """
    if kind == "none":
        return
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    def policy(_: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        name = getattr(op, "__name__", "").partition(".")[0]
        return CheckpointPolicy.MUST_SAVE if name in _SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    for block in blocks:
        # Replace the method, not the module: parameter names stay the same in checkpoints.
        plain = block.forward

        def forward(*args: Any, plain: Any = plain, **named: Any) -> Any:
            # Without gradients there is no backward pass to save for, as when answers are sampled.
            if not torch.is_grad_enabled():
                return plain(*args, **named)
            return checkpoint(plain, *args, **options, **named)

        if "forward" not in vars(block):  # else it was replaced before, by a function of the caller's
            keeps_results(forward)
        block.forward = forward
