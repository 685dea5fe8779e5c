"""The decoder's building blocks: norm, rotary positions, attention, MLP and block.

The caller passes an `Attend`, which says which keys a query sees (causal, packed or cached). So training,
prefill and decode run the same modules.

Shapes: B batch, T tokens, D width, H heads, K key/value heads, d head dimension, S key positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.config import DecoderConfig, RopeScaling
from pumice.errors import InputError


class Attend(Protocol):
    """Attention of one layer: decides which keys and values each query sees."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with rotated q (B, H, T, d) and k, and v (both B, K, T, d). Return (B, H, T, d)."""
        ...


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> Tensor:
    """Compute scaled dot-product attention; query heads may share key/value heads.

    q (B, H, T, d), k and v (B, K, S, d). mask: bool, broadcastable to (B, H, T, S), True = may see. softcap:
    as in `soft_cap`, of the scores.
    """
    if k.dtype != q.dtype:  # of a cache that keeps them in fewer bits
        k, v = k.to(q.dtype), v.to(q.dtype)
    if softcap is not None:
        return _capped_attention(q, k, v, mask, causal, softcap)
    if (
        q.shape[2] == 1
        and q.shape[1] != k.shape[1]
        and (mask is None or mask.dim() < 3 or mask.shape[-3] == 1)
    ):
        # One new token: treat the query heads that share a key/value head as that head's tokens. On a CPU
        # this is several times faster than `enable_gqa`.
        grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)
    shared = q.shape[1] != k.shape[1]
    if shared and q.device.type == "cuda":
        # Of PyTorch's kernels, FlashAttention's alone takes shared heads, and it takes neither a mask nor
        # fp32: then all scores would lie in memory at once (sdp_utils.cpp).
        groups = q.shape[1] // k.shape[1]
        k, v, shared = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), False
    # On a CPU, attention in fp32 is twice as fast as in bf16.
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        mixed = F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal, enable_gqa=shared
        )
        return mixed.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Bound values smoothly to -cap .. cap (Gemma 2, arXiv 2408.00118). None leaves them as they are."""
    return x if cap is None else cap * torch.tanh(x / cap)


def _capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, softcap: float
) -> Tensor:
    # In plain operations, because no fused kernel caps scores.
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = soft_cap(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), softcap)
    if causal:
        queries, keys = (torch.arange(n, device=q.device) for n in (q.shape[2], k.shape[2]))
        mask = causal_mask(queries, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.float().softmax(-1).to(v.dtype) @ v


def causal_mask(queries: Tensor, keys: Tensor, window: int | None = None) -> Tensor:
    """Return a mask for positions of queries (..., T) and keys (..., S): bool (..., T, S), True = may see.

    window: a token sees this many positions, itself included (Mistral, arXiv 2310.06825).
    """
    # Positions, not indices: cached queries start in the middle of their keys.
    distance = queries.unsqueeze(-1) - keys.unsqueeze(-2)
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


class Causal:
    """Causal attention: each row of the batch is one sequence, and a token sees itself and all earlier
    tokens.

    padding: (B, T) bool, True = a real token; padding may be on either side; None = all real. A padded query
    sees itself, so that no row of the softmax is empty.
    """

    def __init__(self, config: DecoderConfig, padding: Tensor | None = None) -> None:
        self.config = config
        self.padding = padding

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens, window, softcap = q.shape[2], self.config.window(layer), self.config.attention_softcap
        # Without a mask, PyTorch uses its fastest kernel.
        if self.padding is None and (window is None or tokens <= window):
            return sdpa(q, k, v, causal=True, softcap=softcap)
        positions = torch.arange(tokens, device=q.device)
        mask = causal_mask(positions, positions, window)[None]
        if self.padding is not None:
            itself = torch.eye(tokens, dtype=torch.bool, device=q.device)
            mask = (mask & self.padding[:, None, :]) | itself
        return sdpa(q, k, v, mask[:, None], softcap=softcap)


def edited(layer: nn.Module, *kinds: type[nn.Module]) -> str | None:
    """Return how a layer differs from a plain one of these classes, None if it does not."""
    if type(layer) not in kinds:
        return f"is a {type(layer).__name__}"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "has hooks"
    return "has a forward of its own" if "forward" in vars(layer) else None


def check_unedited(name: str, layer: nn.Module, *kinds: type[nn.Module]) -> None:
    """Raise InputError if a layer that will be replaced is of none of these classes, or was edited.

    What replaces it takes over its weight alone: whatever else it computes would be lost.
    """
    if (what := edited(layer, *kinds)) is not None:
        raise InputError(
            f"the decoder's {name} {what}, which would be lost where layers are replaced; edit the decoder "
            "afterwards"
        )


class ScaledEmbedding(nn.Embedding):
    """An embedding whose rows are multiplied by a constant (Gemma). Its weight stays that of a tied head."""

    def __init__(self, weight: Tensor, scale: float) -> None:
        super().__init__(weight.shape[0], weight.shape[1], _weight=weight)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids)
        return rows * torch.tensor(self.scale, dtype=rows.dtype)  # rounded like the weights, as Gemma does


class RMSNorm(nn.Module):
    """x / rms(x) * (weight + offset), computed in fp32 (arXiv 1910.07467), in the dtype of the weight."""

    def __init__(self, width: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        if self.offset:  # in fp32: the sum has more digits than a 16-bit weight
            x, weight = x.float(), self.weight.float() + self.offset
        else:
            weight = self.weight.to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, self.eps).to(self.weight.dtype)


@lru_cache(maxsize=16)
def rope_inv_freq(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Return RoPE's angle per position for each pair of values, in radians: (d / 2,) in fp32.

    Scaling "linear" divides all of them by `factor` (arXiv 2306.15595). Scaling "llama3" (Llama 3.1's code)
    divides only low frequencies: those with less than `low_freq_factor` turns in the original context.
    Frequencies with more than `high_freq_factor` turns stay, and those in between are interpolated.
    """
    powers = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / theta**powers
    if scaling is None:
        return inv_freq
    if scaling.kind == "linear":
        return inv_freq / scaling.factor
    turns = scaling.original_context * inv_freq / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    unscaled = ((turns - low) / (high - low)).clamp(0, 1)  # 1 keeps the frequency, 0 divides it
    return inv_freq * (unscaled + (1 - unscaled) / scaling.factor)


def rotary(positions: Tensor, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Return cos and signed sin (B, 1, T, d) in fp32 for positions (B, T), as `rotate` takes them.

    A value is paired with the one d / 2 behind it, as Hugging Face stores weights. The sin of the first half
    is negative.
    """
    # Shared by all layers, so computed once per pass.
    inv_freq = rope_inv_freq(config.head_dim, config.rope_theta, config.rope_scaling, positions.device)
    angles = (positions.float()[..., None] * inv_freq).unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding (arXiv 2104.09864) to x (B, heads, T, d)."""
    x_fp32 = x.float()
    return torch.addcmul(x_fp32 * cos, x_fp32.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads = layer, config.heads, config.kv_heads
        self.head_dim = config.head_dim
        inner, shared = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = nn.Linear(config.width, inner, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, shared, bias=config.qkv_bias)
        self.v = nn.Linear(config.width, shared, bias=config.qkv_bias)
        self.o = nn.Linear(inner, config.width, bias=False)
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, config.norm_eps, config.norm_offset) if config.qk_norm else nn.Identity()
            for _ in range(2)
        )
        # Every `Attend` divides scores by the root of head_dim; q carries what another scale differs by.
        scale = config.attention_scale
        self.q_factor = None if scale is None else scale * math.sqrt(config.head_dim)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, rows: Tensor | None = None
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D). rows: as in `Block`."""
        mixed = attend(self.layer, *self.project(x, cos, sin)).transpose(1, 2)
        # Select before the output projection, which then only multiplies the needed rows.
        if rows is not None:
            mixed = mixed.index_select(1, rows)
        return self.o(mixed.flatten(2))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated q (B, H, T, d) and k, and v (both B, K, T, d)."""
        batch, tokens, _ = x.shape
        heads = (batch, tokens, -1, self.head_dim)
        q = rotate(self.q_norm(self.q(x).view(heads)).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(self.k(x).view(heads)).transpose(1, 2), cos, sin)
        v = self.v(x).view(heads).transpose(1, 2)
        if self.q_factor is not None:
            q = q * self.q_factor
        # Under autocast a norm of q and k gives fp32: attention's kernels want one type.
        return q.to(v.dtype), k.to(v.dtype), v


def gelu_tanh(x: Tensor) -> Tensor:
    """Compute the tanh approximation of GELU, which SigLIP and Gemma were trained with."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": gelu_tanh}


class MLP(nn.Module):
    """SwiGLU, or GeGLU (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()

        def norm(present: bool = True) -> nn.Module:
            return RMSNorm(config.width, config.norm_eps, config.norm_offset) if present else nn.Identity()

        self.attention_norm, self.attention = norm(), Attention(config, layer)
        self.attention_post_norm = norm(config.post_norms)
        self.mlp_norm, self.mlp = norm(), MLP(config)
        self.mlp_post_norm = norm(config.post_norms)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, rows: Tensor | None = None
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D). rows: (R,), return only these positions (B, R, D)."""
        mixed = self.attention_post_norm(self.attention(self.attention_norm(x), cos, sin, attend, rows))
        return self.feed_forward(x if rows is None else x.index_select(1, rows), mixed)

    def feed_forward(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Add what attention gave to the residual stream x, and then what the MLP gives; all (B, T, D)."""
        x = mixed + x
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))
