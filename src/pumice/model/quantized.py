"""Weight-only int8 and int4: the decoder's linear layers as module swaps, while answering.

Weights become small integers; activations, norms, the embedding, the
KV cache, the tower and the connector stay as they are. Few rows (decode) go to PyTorch's own kernels,
which read the integers once; many rows (prefill), other types and other devices multiply with weights
that are restored for the moment, which is right everywhere.

Shapes: M rows, N outputs, K inputs, G = K / GROUP groups.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.errors import InputError
from pumice.model.adapters import LoraLinear

GROUP = 32  # weights of a row that share a scale in int4
KINDS = ("int8", "int4")

# Above so many rows restoring the weights pays: measured in docs/speed.md.
_INT8_ROWS, _INT4_ROWS = 12, 24
_TILE = 64  # the int4 kernel takes whole multiples of so many outputs


def has_int8_kernel() -> bool:
    """Whether this PyTorch multiplies bf16 activations with int8 weights on the CPU without a detour."""
    return hasattr(torch, "_weight_int8pack_mm")


def has_int4_kernel() -> bool:
    """Whether this PyTorch has a fast product of bf16 with int4 for this CPU, and packs as we can read."""
    fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return fast and hasattr(torch, "_weight_int4pack_mm_for_cpu") and _packed_outputs() is not None


class Int8Linear(nn.Module):
    """Weight-only int8: one scale per output row, absolute maximum to 127; no bias is quantised."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        # Rounded to its final type first, so that weights are divided by what multiplies them later.
        scale = (weight.detach().abs().amax(1).float().clamp_min(1e-7) / 127).to(weight.dtype)
        rounded = weight.detach().to(torch.float32, copy=True).div_(scale.float()[:, None]).round_()
        self.register_buffer("weight", rounded.clamp_(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = bias
        self.kernel = _for_kernel(weight) and has_int8_kernel()

    def restored(self, dtype: torch.dtype) -> Tensor:
        """The weights (N, K) as they act."""
        return (self.weight.to(torch.float32) * self.scale.float()[:, None]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        few = x.numel() <= _INT8_ROWS * self.weight.shape[1]
        if self.kernel and few and not x.requires_grad:  # the kernel has no derivative
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale)
            y = y.view(*x.shape[:-1], len(self.weight))
        else:
            y = F.linear(x, self.weight.to(x.dtype)).mul_(self.scale)
        return y if self.bias is None else y + self.bias


class Int4Linear(nn.Module):
    """Weight-only int4: a scale and an offset per GROUP inputs of a row; no bias is quantised.

    A weight is (n - 8) scale + offset with n from 0 to 15, so that 0 is the group's least and 15 its
    greatest. Made for the device and type of `weight`: packed for the CPU's kernel where that will
    run, else two to a byte.
    """

    packed: Tensor
    scale_offset: Tensor  # (G, N, 2), as the kernel takes it

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        weight = weight.detach()
        self.outputs, self.inputs = weight.shape
        if not self.fits(weight):
            raise InputError(f"int4 needs rows of whole groups of {GROUP}; a row has {self.inputs} weights")
        self.kernel = _for_kernel(weight) and has_int4_kernel()
        if self.kernel and self.outputs % _TILE:
            weight = F.pad(weight, (0, 0, 0, _TILE - self.outputs % _TILE))
        groups = weight.to(torch.float32).view(len(weight), -1, GROUP)
        least, greatest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        # Rounded to their final type first, so that weights are divided by what multiplies them later.
        scale = ((greatest - least) / 15).clamp_min(1e-7).to(weight.dtype)
        offset = (least + 8 * scale.float()).to(weight.dtype)
        numbers = ((groups - offset.float()) / scale.float()).round_().add_(8).clamp_(0, 15)
        numbers = numbers.view(len(weight), -1)
        if self.kernel:
            packed = torch._convert_weight_to_int4pack_for_cpu(numbers.to(torch.int32), 1)
        else:
            packed = _pack(numbers.to(torch.uint8))
        self.register_buffer("packed", packed)
        self.register_buffer("scale_offset", torch.cat((scale, offset), -1).transpose(0, 1).contiguous())
        self.bias = bias

    @staticmethod
    def fits(weight: Tensor) -> bool:
        return weight.shape[1] % GROUP == 0

    def restored(self, dtype: torch.dtype) -> Tensor:
        """The weights (N, K) as they act."""
        numbers = _unpack_tiles(self.packed) if self.kernel else _unpack(self.packed)
        scale, offset = self.scale_offset.transpose(0, 1).unsqueeze(-2).unbind(-1)  # (N, G, 1) each
        groups = numbers.view(len(numbers), -1, GROUP).to(dtype).sub_(8)
        weight = torch.addcmul(offset.to(dtype), groups, scale.to(dtype))
        return weight.reshape(len(numbers), -1)[: self.outputs]

    def forward(self, x: Tensor) -> Tensor:
        few = x.numel() <= _INT4_ROWS * self.inputs
        if self.kernel and few and not x.requires_grad:  # the kernel has no derivative
            rows = x.flatten(0, -2)
            y = torch._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scale_offset)
            y = y[:, : self.outputs].view(*x.shape[:-1], self.outputs)
        else:
            y = F.linear(x, self.restored(x.dtype))
        return y if self.bias is None else y + self.bias


def quantize(decoder: nn.Module, kind: str) -> None:
    """Swap every plain linear layer of the decoder for its "int8" or "int4" form, where it is to run.

    Layers that read the same input become one (`joins` of their module). The vocabulary projection is
    the most sensitive layer and takes int8 in either form; a tied one gets a copy, and the embedding stays
    as it is, to look tokens up in. So do int4 layers whose rows are no whole groups.
    """
    if kind not in KINDS:
        raise InputError(f"weights are quantised to {' or '.join(KINDS)}, not {kind!r}")
    if any(isinstance(module, LoraLinear) for module in decoder.modules()):
        raise InputError("merge the LoRA adapters before quantising")

    def small(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        as_int4 = kind == "int4" and name != "head" and Int4Linear.fits(weight)
        return Int4Linear(weight, bias) if as_int4 else Int8Linear(weight, bias)

    for parent in list(decoder.modules()):
        joined, parts = getattr(parent, "joins", ("", ()))
        if joined:
            layers = [getattr(parent, part) for part in parts]
            biases = [layer.bias for layer in layers if layer.bias is not None]
            weight = torch.cat([layer.weight.detach() for layer in layers])
            setattr(parent, joined, small(joined, weight, torch.cat(biases) if biases else None))
            for part in parts:
                delattr(parent, part)
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, small(name, child.weight, child.bias))
    if decoder.head is None:
        decoder.head = Int8Linear(decoder.embed.weight)


def _for_kernel(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def _pack(numbers: Tensor) -> Tensor:
    """(N, K) uint8 below 16 -> (N, K / 2), two to a byte."""
    return numbers[:, ::2] | numbers[:, 1::2] << 4


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)


def _unpack_tiles(packed: Tensor, outputs: int | None = None) -> Tensor:
    """Inverse of `_convert_weight_to_int4pack_for_cpu`, which packs tiles of `outputs` outputs.

    Tiles lie one after another. In a tile of 2 h outputs each input has h bytes, output n in the lower and
    n + h in the upper half of byte n.
    """
    outputs = outputs or _packed_outputs()
    if outputs is None:
        raise RuntimeError("PyTorch packs int4 weights in an unknown way on this processor")
    tiles = packed.view(len(packed) // outputs, -1, outputs // 2)  # (N / 2 h, K, h)
    tiles = tiles.transpose(1, 2)
    return torch.cat((tiles & 15, tiles >> 4), 1).reshape(len(packed), -1)


@lru_cache(maxsize=1)
def _packed_outputs() -> int | None:
    """Return how many outputs PyTorch packs together: 64 with AVX-512, 32 with AVX2; None if otherwise."""
    numbers = torch.arange(2 * _TILE * GROUP, dtype=torch.int32).view(2 * _TILE, GROUP) * 7 // 3 % 16
    packed = torch._convert_weight_to_int4pack_for_cpu(numbers, 1)
    known = (64, 32)
    return next((n for n in known if torch.equal(_unpack_tiles(packed, n).to(torch.int32), numbers)), None)
