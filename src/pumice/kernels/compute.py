"""Quantise weights, and multiply with packed matrices: in compiled code, or else in PyTorch.

Shapes: M rows of activations, N outputs, K inputs, G = K / 32 groups.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.errors import InputError, WorkError
from pumice.kernels.loader import compiled
from pumice.kernels.packed import (
    GROUP,
    SUPER,
    BlockFormat,
    PackedMatrix,
    Parts,
    concatenate,
    pack,
    packed_size,
)

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in quantize.c
LARGEST = torch.finfo(torch.float16).max  # scales have 16 bits; quantize.c has the same bound
_CHUNK = 1 << 21  # weights that PyTorch quantises at a time
# Activation functions of vision transformers, as in linear.c.
_ACTIVATION_CODES = {"quick_gelu": 0, "gelu": 1, "gelu_tanh": 2}
# The kernels with an instruction that multiplies and adds bytes by fours, several times as fast as fp32.
_FAST_KERNELS = ("AVX-512 VNNI", "AVX-VNNI", "NEON dot product")
# A group's range is divided into 15 + n steps, for each n of these. The n with the smallest error wins.
_EXTRA_STEPS = (0.0, 0.4, -0.4, 0.8, -0.8)


class PackedStruct(ctypes.Structure):
    """`Packed` of packed.h. It holds addresses, so keep its tensors alive as long as C uses it."""

    _fields_ = [
        ("kind", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


def packed_struct(packed: PackedMatrix, bias: Tensor | None = None) -> PackedStruct:
    """Return the matrix as C reads it. bias: (N,) fp32, contiguous."""
    bias_address = None if bias is None else bias.data_ptr()
    return PackedStruct(packed.kind.code, packed.outputs, packed.inputs, packed.data.data_ptr(), bias_address)


def library() -> ctypes.CDLL | None:
    """Return the compiled code, or None if there is none or PyTorch is faster.

    Without OpenMP the code has one thread. PyTorch with several threads is faster then.
    """
    code, _ = compiled("packed")
    slower = code is not None and torch.get_num_threads() > 1 and not code.pumice_threads()
    return None if slower else code


def kernel_name() -> str:
    """Return what multiplies packed matrices: "PyTorch", or the kernel that product.h chose, as "AVX2"."""
    code = library()
    if code is None:
        return "PyTorch"
    name: bytes = code.pumice_kernel()
    return name.decode()


def multiplies_fast() -> bool:
    """Return whether products in integers are much faster on this processor than those in 32 bits."""
    return kernel_name() in _FAST_KERNELS


def can_multiply(x: Tensor) -> bool:
    """Return whether compiled code multiplies these activations: on a CPU, without a gradient.

    They must be a plain tensor: others, such as the fake ones of `pumice plan`, may have no memory to read.
    """
    return type(x) is Tensor and x.device.type == "cpu" and not x.requires_grad and library() is not None


def linear(x: Tensor, packed: PackedMatrix, bias: Tensor | None = None) -> Tensor:
    """Return x (..., K) times the matrix plus the bias (N,): (..., N), in the type of x.

    On a CPU the product is one of integers: activations are rounded to 8 bits, with a scale for each 32
    (beside Q4_K: for each 256). A row of the result depends only on that row of x. On other devices, and if x
    needs a gradient, the weights are restored first. x may lack less than a group of the matrix's inputs:
    they are zeros. Raise WorkError if C cannot allocate its buffers.
    """
    _check_width(x.shape[-1], packed)
    if not can_multiply(x):
        return _restored_linear(x, packed, bias)
    code = library()
    assert code is not None
    rows, bias = _rows(x), _fp32(bias)
    y = torch.empty(len(rows), packed.outputs)
    if len(rows):
        error = code.pumice_linear(
            ctypes.byref(packed_struct(packed, bias)), *map(ctypes.c_int64, rows.shape),
            ctypes.c_void_p(rows.data_ptr()), ctypes.c_void_p(y.data_ptr()), torch.get_num_threads(),
        )  # fmt: skip
        if error:
            raise WorkError(f"no memory is left for {len(rows)} rows of {packed.inputs} activations")
    return y.view(*x.shape[:-1], packed.outputs).to(x.dtype)


def mlp(
    x: Tensor,
    up: PackedMatrix,
    up_bias: Tensor | None,
    down: PackedMatrix,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Return down(activation(up(x))) as two calls of `linear` do, where `can_multiply`.

    x: (..., K of `up`). The result: (..., N of `down`). What is between the products stays in the processor's
    cache. down: not in Q4_K. activation: "quick_gelu", "gelu" or "gelu_tanh". Raise WorkError if C cannot
    allocate its buffers.
    """
    if down.kind is BlockFormat.Q4_K:  # whose activations share scales beyond the outputs at hand
        raise ValueError("the second matrix of an MLP cannot be in Q4_K")
    _check_width(x.shape[-1], up)
    _check_width(up.outputs, down)
    code = library()
    assert code is not None
    rows, up_bias, down_bias = _rows(x), _fp32(up_bias), _fp32(down_bias)
    y = torch.empty(len(rows), down.outputs)
    if len(rows):
        error = code.pumice_mlp(
            ctypes.byref(packed_struct(up, up_bias)), ctypes.byref(packed_struct(down, down_bias)),
            *map(ctypes.c_int64, rows.shape), ctypes.c_void_p(rows.data_ptr()), _ACTIVATION_CODES[activation],
            ctypes.c_void_p(y.data_ptr()), torch.get_num_threads(),
        )  # fmt: skip
        if error:
            raise WorkError(f"no memory is left for an MLP of {down.inputs} activations")
    return y.view(*x.shape[:-1], down.outputs).to(x.dtype)


def _check_width(width: int, packed: PackedMatrix) -> None:
    if not 0 <= packed.inputs - width < GROUP:
        raise ValueError(f"rows of {width} activations do not fit a matrix of {packed.inputs} inputs")


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).to(torch.float32).contiguous()


def _fp32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to(torch.float32).contiguous()


def quantize(weight: Tensor, kind: BlockFormat, name: str = "a matrix") -> PackedMatrix:
    """Quantise weights (N, K) to Q8_0, Q4_1 or Q4_K.

    name: of the matrix, for messages. Raise InputError if K is not a multiple of the block, WorkError if a
    weight is not finite, or larger than a scale can be.
    """
    outputs, inputs = weight.shape
    check_rows(name, inputs, kind)
    code, weight = library(), weight.detach().cpu().contiguous()
    if code is None or weight.dtype not in _DTYPE_CODES:
        return _quantize_in_pytorch(weight, kind, name)
    data = torch.zeros(packed_size(kind, outputs, inputs), dtype=torch.uint8)
    bad_row = code.pumice_quantize(
        kind.code, _DTYPE_CODES[weight.dtype], ctypes.c_int64(outputs), ctypes.c_int64(inputs),
        ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(data.data_ptr()), torch.get_num_threads(),
    )  # fmt: skip
    if bad_row >= 0:
        raise _bad_weight(name, bad_row, weight)
    return PackedMatrix(kind, outputs, inputs, data)


def check_rows(name: str, inputs: int, kind: BlockFormat) -> None:
    """Raise InputError unless rows of `inputs` weights are whole blocks of `kind`."""
    if not inputs or inputs % kind.block:
        raise InputError(
            f"{name} has rows of {inputs} weights, not whole groups of {kind.block}, so it cannot be "
            "quantised; use --quantize none"
        )


def _bad_weight(name: str, row: int, weight: Tensor) -> WorkError:
    if weight[row].isfinite().all():
        return WorkError(
            f"{name} holds a weight beyond {LARGEST:.0f} in row {row}, too large for scales of 16 bits; use "
            "--quantize none"
        )
    return WorkError(f"{name} holds a weight that is not finite in row {row}; get the model again")


def _restored_linear(x: Tensor, packed: PackedMatrix, bias: Tensor | None) -> Tensor:
    y = F.linear(x, packed.restored(x.dtype)[:, : x.shape[-1]])
    return y if bias is None else y + bias.to(y.dtype)


def _quantize_in_pytorch(weight: Tensor, kind: BlockFormat, name: str) -> PackedMatrix:
    """Quantise weights with about the error of compiled code, some rows at a time to save memory."""
    to_parts = {BlockFormat.Q8_0: _to_q8_0, BlockFormat.Q4_1: _to_q4_1, BlockFormat.Q4_K: _to_q4_k}[kind]
    chunks = []
    chunk_rows = max(1, _CHUNK // weight.shape[1])
    for first in range(0, len(weight), chunk_rows):
        rows = weight[first : first + chunk_rows].float()
        if not (sound := (rows.abs() <= LARGEST).all(1)).all():  # nan is not
            raise _bad_weight(name, first + int((~sound).nonzero()[0]), weight)
        chunks.append(to_parts(rows.view(len(rows), -1, GROUP)))
    return pack(kind, concatenate(chunks))


def _to_q8_0(groups: Tensor) -> Parts:
    """Quantise groups (n, G, 32): the largest weight of a group becomes 127 or -127."""
    scales = (groups.abs().amax(-1, keepdim=True) / 127).half()
    numbers = _round(groups / _divisor(scales), -127, 127)
    return Parts((numbers + 128).to(torch.uint8), scales)


def _to_q4_1(groups: Tensor) -> Parts:
    """Quantise groups (n, G, 32): a scale and an offset for each group."""
    # The best line may begin beyond the lowest weight, and beyond what 16 bits hold.
    scales, offsets = (x.clamp(-LARGEST, LARGEST).half() for x in _fit(groups, positive_offsets=True))
    numbers = _round((groups - offsets.float()) / _divisor(scales), 0, 15)
    return Parts(numbers.to(torch.uint8), torch.cat((scales, offsets), -1))


def _to_q4_k(groups: Tensor) -> Parts:
    """Quantise groups (n, G, 32): a group's scale and offset are factors, 0 to 63, of those of its block."""
    scales, offsets = _fit(groups, positive_offsets=False)
    exact = torch.cat((scales, -offsets), -1)  # (n, G, 2)
    halves = (exact.unflatten(1, (-1, SUPER)).amax(2) / 63).half()  # of a block: (n, G / 8, 2)
    units = halves.repeat_interleave(SUPER, 1)  # of each group's block: (n, G, 2)
    factors = _round(exact / _divisor(units), 0, 63)
    scales, offsets = (factors * units.float()).split(1, -1)
    numbers = _round((groups + offsets) / _divisor(scales), 0, 15)
    return Parts(numbers.to(torch.uint8), halves, factors.to(torch.uint8))


def _fit(groups: Tensor, positive_offsets: bool) -> tuple[Tensor, Tensor]:
    """Return scales and offsets (n, G, 1) with a small squared error for numbers from 0 to 15.

    As ggml's make_qkx2_quants, without weights: try several scales, and improve each by least squares.
    positive_offsets: whether offsets may be above zero.
    """
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    low = low if positive_offsets else low.clamp(max=0)
    scales, offsets = (high - low) / 15, low
    best_errors = torch.full_like(scales, torch.inf)
    for extra in _EXTRA_STEPS:
        # 1. Round the group with this scale.
        numbers = _round((groups - low) / _divisor((high - low) / (15 + extra)), 0, 15)
        # 2. The line a * number + b with the least squared error, for these numbers.
        n1, n2 = numbers.sum(-1, keepdim=True), numbers.square().sum(-1, keepdim=True)
        nx, total = (numbers * groups).sum(-1, keepdim=True), groups.sum(-1, keepdim=True)
        spread = GROUP * n2 - n1 * n1
        a, b = (GROUP * nx - n1 * total) / spread, (n2 * total - n1 * nx) / spread
        if not positive_offsets:  # then the best line through 0
            a, b = torch.where(b > 0, nx / n2, a), b.clamp(max=0)
        errors = (groups - a * numbers - b).square().sum(-1, keepdim=True)
        # 3. Keep it where it is better. If all numbers of a group are equal, a is NaN, which is never better.
        better = (errors < best_errors) & (a > 0)
        scales, offsets = torch.where(better, a, scales), torch.where(better, b, offsets)
        best_errors = torch.where(better, errors, best_errors)
    return scales, offsets


def _divisor(scales: Tensor) -> Tensor:
    """Return the scales in fp32, with infinity for 0: a group of zeros then divides to zeros."""
    scales = scales.float()
    return torch.where(scales > 0, scales, torch.inf)


def _round(numbers: Tensor, low: int, high: int) -> Tensor:
    return numbers.round().clamp(low, high)
