"""The decoder is the language model: token embedding, blocks, final norm and vocabulary projection.

Llama, Mistral, Qwen2, Qwen3 and Gemma 2 are settings of `DecoderConfig`.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.capability import GEMMA2, LLAMA, ROPE_SCALING, Capability, fields
from pumice.config import DecoderConfig, RopeScaling
from pumice.errors import InputError
from pumice.kernels.compute import linear
from pumice.model.layers import Attend, Block, RMSNorm, ScaledEmbedding, rotary, soft_cap
from pumice.model.quantized import PackedEmbedding, PackedLinear

CAPABILITY = Capability(
    "the decoder",
    {
        DecoderConfig: fields(f"{LLAMA} {GEMMA2}"),
        RopeScaling: fields(ROPE_SCALING),
    },
)
# The kinds of rotary scaling, and the fields that each uses.
_SCALINGS = {"linear": "kind factor", "llama3": ROPE_SCALING}


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        CAPABILITY.check(config)
        if (scaling := config.rope_scaling) is not None:
            used = fields(_SCALINGS[scaling.kind])
            Capability(f"{scaling.kind} scaling", {RopeScaling: used}).check(scaling)
        if config.window_pattern > 1 and config.sliding_window is None:
            raise InputError(
                f"window_pattern is {config.window_pattern}, but no layer has a window; set sliding_window "
                "or leave window_pattern out"
            )
        self.config = config
        # nn.Embedding draws random values, even on meta, where this only imports torch's compiler. So pass it
        # a weight, and draw here if there is something to draw.
        vocabulary = torch.empty(config.vocab_size, config.width)
        if not vocabulary.is_meta:  # where drawing nothing would import all of torch's compiler
            nn.init.normal_(vocabulary)
        self.embed: nn.Embedding | PackedEmbedding = (
            nn.Embedding(config.vocab_size, config.width, _weight=vocabulary)
            if config.embed_scale == 1.0
            else ScaledEmbedding(vocabulary, config.embed_scale)
        )
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps, config.norm_offset)
        self.head: nn.Linear | PackedLinear | None = None
        if not config.tied_head:
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        attend: Attend,
        out: dict[str, Tensor] | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Run embedded tokens x (B, T, D) at positions (B, T). Return hidden states (B, T, D) after the norm.

        rows: (R,), return only these hidden states (B, R, D); for all other rows, the last block computes
        only keys and values. out: receives the residual stream before the first block as `embeddings`, and
        after each block as `decoder.blocks.{i}`.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()  # the residual stream adds up small updates, which bf16 would round away
        if out is not None:
            out["embeddings"] = x
        cos, sin = rotary(positions, self.config)
        for number, block in enumerate(self.blocks):
            # Only the last block may skip rows: all earlier ones feed the keys and values above.
            x = block(x, cos, sin, attend, None if number + 1 < len(self.blocks) else rows)
            if out is not None:
                out[f"decoder.blocks.{number}"] = x
        return self.norm(x)

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations outside autocast."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def cache_dtype(self) -> torch.dtype:
        """The type in which keys and values are kept: half of fp32 where weights are in few bits."""
        packed = isinstance(self.embed, PackedEmbedding)
        return torch.bfloat16 if packed and self.dtype == torch.float32 else self.dtype

    @property
    def head_weight(self) -> Tensor:
        """The vocabulary projection (V, D), of a decoder that is not quantised."""
        layer = self.embed if self.head is None else self.head
        if isinstance(layer, PackedEmbedding | PackedLinear):
            raise TypeError("the vocabulary projection is quantised")
        return layer.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states (..., D) to logits (..., V). Pass only the positions that need logits."""
        # As one matrix: for a slice such as hidden[:, -1:], PyTorch would copy the whole weight.
        rows = hidden.reshape(-1, self.config.width)
        layer = self.embed if self.head is None else self.head
        if isinstance(layer, PackedLinear):
            logits = layer(rows)
        elif isinstance(layer, PackedEmbedding):  # tied: its bytes are held once, on every device
            logits = linear(rows, layer.packed)
        else:
            logits = F.linear(rows, self.head_weight.to(rows.dtype))
        logits = soft_cap(logits, self.config.logit_softcap)
        return logits.view(*hidden.shape[:-1], self.config.vocab_size)
