"""Quantise weights and multiply with packed matrices, in compiled code, or in PyTorch where there is none.

Shapes: M rows of activations, N outputs, K inputs, G = K / 32 groups.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.errors import InputError
from pumice.kernels.loader import compiled
from pumice.kernels.packed import GROUP, SUPER, BlockFormat, PackedMatrix, Parts, joined, pack, size

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # of weights, as quantize.c numbers them
_PIECE = 1 << 21  # weights that PyTorch quantises at a time
# By how many steps of 15 a group's range is made narrower before it is rounded; the best is taken.
_NARROWER = (0.0, 0.4, -0.4, 0.8, -0.8)


class Matrix(ctypes.Structure):
    """`Packed` of packed.h: it holds addresses, so its tensors must be kept."""

    _fields_ = [
        ("kind", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


def matrix(packed: PackedMatrix, bias: Tensor | None = None) -> Matrix:
    """bias: fp32, contiguous."""
    shift = None if bias is None else bias.data_ptr()
    return Matrix(packed.kind.code, packed.outputs, packed.inputs, packed.data.data_ptr(), shift)


def library() -> ctypes.CDLL | None:
    """The compiled code, where it uses as many threads as PyTorch does."""
    code, _ = compiled("packed")
    alone = code is not None and torch.get_num_threads() > 1 and not code.pumice_threads()
    return None if alone else code


def kernel_name() -> str:
    """What multiplies packed matrices here: "AVX-512 VNNI", "AVX2", "plain C" or "PyTorch"."""
    code = library()
    if code is None:
        return "PyTorch"
    code.pumice_kernel.restype = ctypes.c_char_p
    name: bytes = code.pumice_kernel()
    return name.decode()


def linear(x: Tensor, packed: PackedMatrix, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times the matrix, plus the bias: (..., N), in the type of x.

    On a CPU in integers: activations get 8 bits, a scale for each 32. A row of the result depends on that row
    of x alone. Elsewhere, and where a gradient is asked for, with the weights restored.
    """
    code = library() if x.device.type == "cpu" and not x.requires_grad else None
    if code is None:
        return _restored_linear(x, packed, bias)
    rows = x.detach().reshape(-1, packed.inputs).to(torch.float32).contiguous()
    y = torch.empty(len(rows), packed.outputs)
    if len(rows):
        bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
        failed = code.pumice_linear(
            ctypes.byref(matrix(packed, bias)), ctypes.c_int64(len(rows)), ctypes.c_void_p(rows.data_ptr()),
            ctypes.c_void_p(y.data_ptr()), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"{len(rows)} rows of {packed.inputs} activations found no memory")
    return y.view(*x.shape[:-1], packed.outputs).to(x.dtype)


def quantize(weight: Tensor, kind: BlockFormat, name: str = "a matrix") -> PackedMatrix:
    """Weights (N, K) in blocks of a kind: Q8_0, Q4_1 or Q4_K.

    name: for messages. Raises InputError where rows are no whole blocks, or a weight is not finite.
    """
    outputs, inputs = weight.shape
    check_rows(name, inputs, kind)
    code = library() if weight.device.type == "cpu" else None
    weight = weight.detach().contiguous()
    if code is None or weight.dtype not in _TYPES:
        return _quantize(weight.cpu(), kind, name)
    packed = PackedMatrix(kind, outputs, inputs, torch.zeros(size(kind, outputs, inputs), dtype=torch.uint8))
    code.pumice_quantize.restype = ctypes.c_int64
    bad = code.pumice_quantize(
        kind.code, _TYPES[weight.dtype], ctypes.c_int64(outputs), ctypes.c_int64(inputs),
        ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(packed.data.data_ptr()), torch.get_num_threads(),
    )  # fmt: skip
    if bad >= 0:
        raise _not_finite(name, bad)
    return packed


def check_rows(name: str, inputs: int, kind: BlockFormat) -> None:
    """Raise InputError unless rows are whole blocks."""
    if not inputs or inputs % kind.block:
        raise InputError(
            f"{name} has rows of {inputs} weights, not whole groups of {kind.block}, so it cannot be "
            "quantised; use --quantize none"
        )


def _not_finite(name: str, row: int) -> InputError:
    return InputError(f"{name} holds a weight that is not finite in row {row}; get the model again")


def _restored_linear(x: Tensor, packed: PackedMatrix, bias: Tensor | None) -> Tensor:
    y = F.linear(x, packed.restored(x.dtype))
    return y if bias is None else y + bias.to(y.dtype)


def _quantize(weight: Tensor, kind: BlockFormat, name: str) -> PackedMatrix:
    """`quantize` in PyTorch, piece by piece."""
    made = []
    many = max(1, _PIECE // weight.shape[1])
    for first in range(0, len(weight), many):
        piece = weight[first : first + many].float()
        if not (fine := piece.isfinite().all(1)).all():
            raise _not_finite(name, first + int((~fine).nonzero()[0]))
        groups = piece.view(len(piece), -1, GROUP)
        made.append({BlockFormat.Q8_0: _eight, BlockFormat.Q4_1: _four}.get(kind, _super)(groups))
    return pack(kind, joined(made))


def _eight(groups: Tensor) -> Parts:
    """(n, G, 32) -> Q8_0."""
    scales = (groups.abs().amax(-1, keepdim=True) / 127).half()
    numbers = _round(groups / _divisor(scales), -127, 127)
    return Parts((numbers + 128).to(torch.uint8), scales)


def _four(groups: Tensor) -> Parts:
    """(n, G, 32) -> Q4_1."""
    scales, offsets = (x.half() for x in _fit(groups, above=True))
    numbers = _round((groups - offsets.float()) / _divisor(scales), 0, 15)
    return Parts(numbers.to(torch.uint8), torch.cat((scales, offsets), -1))


def _super(groups: Tensor) -> Parts:
    """(n, G, 32) -> Q4_K: scales and offsets of 32 are factors from 0 to 63 of those of 256."""
    scales, offsets = _fit(groups, above=False)
    both = torch.cat((scales, -offsets), -1)  # (n, G, 2)
    halves = (both.unflatten(1, (-1, SUPER)).amax(2) / 63).half()
    wide = halves.repeat_interleave(SUPER, 1)
    factors = _round(both / _divisor(wide), 0, 63)
    scales, offsets = (factors * wide.float()).split(1, -1)
    numbers = _round((groups + offsets) / _divisor(scales), 0, 15)
    return Parts(numbers.to(torch.uint8), halves, factors.to(torch.uint8))


def _fit(groups: Tensor, above: bool) -> tuple[Tensor, Tensor]:
    """Scales and offsets (n, G, 1) of small squared error. above: whether offsets may be above zero."""
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    least = least if above else least.clamp(max=0)
    scales, offsets = (most - least) / 15, least
    best = torch.full_like(scales, torch.inf)
    for narrower in _NARROWER:
        numbers = _round((groups - least) / _divisor((most - least) / (15 + narrower)), 0, 15)
        n1, n2 = numbers.sum(-1, keepdim=True), numbers.square().sum(-1, keepdim=True)
        nx, total = (numbers * groups).sum(-1, keepdim=True), groups.sum(-1, keepdim=True)
        spread = GROUP * n2 - n1 * n1
        a, b = (GROUP * nx - n1 * total) / spread, (n2 * total - n1 * nx) / spread
        if not above:
            a, b = torch.where(b > 0, nx / n2, a), b.clamp(max=0)
        errors = (groups - a * numbers - b).square().sum(-1, keepdim=True)
        better = (errors < best) & (a > 0)  # where nothing spreads these are no numbers, and not better
        scales, offsets = torch.where(better, a, scales), torch.where(better, b, offsets)
        best = torch.where(better, errors, best)
    return scales, offsets


def _divisor(scales: Tensor) -> Tensor:
    wide = scales.float()
    return torch.where(wide > 0, wide, torch.inf)


def _round(numbers: Tensor, least: int, most: int) -> Tensor:
    return numbers.round().clamp(least, most)
