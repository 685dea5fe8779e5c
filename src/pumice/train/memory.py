"""What is kept of a forward pass, and what is computed again instead.

Knows modules and PyTorch's checkpointing. Does not know what the modules are for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

Kind = Literal["none", "selective", "full"]

# Costly to compute again, cheap to keep: matrix products and attention.
_KEPT = {
    "mm", "addmm", "bmm", "linear", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
}  # fmt: skip


def checkpoint_blocks(blocks: Iterable[nn.Module], kind: Kind) -> None:
    """Have each block keep less for its backward pass.

    full: its input alone; it runs twice, which costs a third of the step's compute. selective: the outputs
    of its matrix products and of attention; only what lies between them runs twice. Numbers stay the same,
    dropout's included.
    """
    if kind == "none":
        return
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    def policy(_: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        name = getattr(op, "__name__", "").partition(".")[0]
        return CheckpointPolicy.MUST_SAVE if name in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    for block in blocks:
        plain = block.forward

        def forward(*args: Any, plain: Any = plain, **named: Any) -> Any:
            if not torch.is_grad_enabled():
                return plain(*args, **named)
            return checkpoint(plain, *args, **options, **named)

        block.forward = forward
