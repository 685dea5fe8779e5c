"""Integer products of every kernel against a plain reference, on random and on extreme numbers."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.kernels import compute, loader
from pumice.kernels.compute import kernel_name, linear, mlp, quantize
from pumice.kernels.packed import GROUP, BlockFormat, PackedMatrix, Parts, pack, packed_size
from pumice.model.vision import ACTIVATIONS

KERNELS = Path(loader.__file__).parent
KINDS = pytest.mark.parametrize("kind", BlockFormat, ids=lambda kind: kind.name)


def built(folder: Path, compiler: str, source: Path, *flags: str, emulates: Path | None = None) -> Path:
    """Compile a C file for tests. Skip where the compiler does not take the flags, or is of no x86.

    emulates: a header, for x86, that is included first.
    """
    found = shutil.which(compiler)
    if found is None:
        pytest.skip(f"there is no {compiler}")
    target = folder / "built"

    def compiled(*files: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
        command = [found, "-O2", "-ffp-contract=off", f"-I{KERNELS}", *flags, *files, "-o", target, "-lm"]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False)

    # A kernel that does not compile must fail, so the flags are tried without it.
    trial = compiled("-x", "c", "-", text="#include <immintrin.h>\n" * bool(emulates) + "int main(void) {}")
    if trial.returncode:
        pytest.skip(f"{compiler} does not take {' '.join(flags)}: {trial.stderr[-200:]}")
    process = compiled(*(["-include", emulates] if emulates else []), source)
    assert process.returncode == 0, process.stderr
    return target


@pytest.fixture(scope="module")
def emulated_vnni(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernel for AVX-512 VNNI, its instructions in plain C."""
    header, folder = Path(__file__).with_name("emulated_vnni.h"), tmp_path_factory.mktemp("vnni")
    # Emulated registers are structs in memory, whose places GCC 12 shares too early.
    flags = ("-shared", "-fPIC", "-fstack-reuse=none")
    return loader.open_library(built(folder, "gcc", KERNELS / "linear.c", *flags, emulates=header))


@pytest.fixture(scope="module")
def emulated_avx_vnni(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernel for AVX-VNNI, which needs AVX2 and has its own instruction in plain C."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no AVX2")
    header, folder = Path(__file__).with_name("emulated_avx_vnni.h"), tmp_path_factory.mktemp("avx-vnni")
    flags = ("-shared", "-fPIC", "-mavx2", "-mfma", "-mf16c")
    return loader.open_library(built(folder, "gcc", KERNELS / "linear.c", *flags, emulates=header))


class Program:
    """Stands for a library whose functions a program of its own computes."""

    def __init__(self, *command: str | Path) -> None:
        self._command = command

    def pumice_kernel(self) -> bytes:
        process = subprocess.run([*self._command, "name"], capture_output=True, check=True)
        return process.stdout.strip()

    def pumice_linear(
        self,
        matrix: Any,
        rows: ctypes.c_int64,
        width: ctypes.c_int64,
        x: ctypes.c_void_p,
        y: ctypes.c_void_p,
        threads: int,
    ) -> int:
        return self._run([matrix._obj], rows.value, width.value, x, 0, y)

    def pumice_mlp(
        self,
        up: Any,
        down: Any,
        rows: ctypes.c_int64,
        width: ctypes.c_int64,
        x: ctypes.c_void_p,
        activation: int,
        y: ctypes.c_void_p,
        threads: int,
    ) -> int:
        return self._run([up._obj, down._obj], rows.value, width.value, x, activation, y)

    def _run(
        self,
        matrices: list[Any],
        rows: int,
        width: int,
        x: ctypes.c_void_p,
        activation: int,
        y: ctypes.c_void_p,
    ) -> int:
        given = struct.pack("4q", len(matrices), rows, width, activation)
        for w in matrices:
            size = packed_size(list(BlockFormat)[w.kind], w.outputs, w.inputs)
            given += struct.pack("5q", w.kind, w.outputs, w.inputs, size, w.bias is not None)
            given += ctypes.string_at(w.data, size)
            given += ctypes.string_at(w.bias, 4 * w.outputs) if w.bias else b""
        if x.value:
            given += ctypes.string_at(x.value, 4 * rows * width)
        process = subprocess.run(self._command, input=given, capture_output=True, check=True)
        ctypes.memmove(y.value, process.stdout, 4 * rows * matrices[-1].outputs)
        return 0


@pytest.fixture(scope="module")
def emulated_neon(tmp_path_factory: pytest.TempPathFactory) -> Program:
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("there is no qemu-aarch64")
    source, folder = Path(__file__).with_name("run_linear.c"), tmp_path_factory.mktemp("neon")
    program = built(folder, "aarch64-linux-gnu-gcc", source, "-static", "-march=armv8.2-a+dotprod")
    return Program("qemu-aarch64", "-cpu", "max", program)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Plain C that ends where an address is not aligned, a number overflows, or a shift is too wide."""
    source, folder = Path(__file__).with_name("run_linear.c"), tmp_path_factory.mktemp("checked")
    flags = ("-DPUMICE_PLAIN", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
    return Program(built(folder, "gcc", source, *flags))


BUILT_HERE = {
    "emulated_vnni": "AVX-512 VNNI", "emulated_avx_vnni": "AVX-VNNI", "emulated_neon": "NEON dot product",
    "checked": "plain C",
}  # fmt: skip


@pytest.fixture(params=["own", "plain", *BUILT_HERE])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make `linear` use this kernel."""
    if request.param in BUILT_HERE:
        code = request.getfixturevalue(request.param)
    else:
        code, reason = loader.compiled("packed" if request.param == "own" else "plain")
        if code is None:
            pytest.skip(reason)
    monkeypatch.setattr(compute, "library", lambda: code)
    name = kernel_name()
    expected = {"plain": "plain C", **BUILT_HERE}
    assert name == expected.get(request.param, name)
    yield name


def random_matrix(kind: BlockFormat, outputs: int, inputs: int, seed: int = 0) -> PackedMatrix:
    """Every number of a block is possible; scales are of many sizes."""
    from pumice.kernels.packed import from_blocks

    generator = torch.Generator().manual_seed(seed)
    shape = (outputs, inputs // kind.block, kind.block_bytes)
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    halves = 2 if kind in (BlockFormat.Q8_0, BlockFormat.Q4_0) else 4
    sizes = torch.rand((*shape[:2], halves // 2), generator=generator) * 10 - 12
    blocks[..., :halves] = (2**sizes).half().view(torch.uint8)
    return from_blocks(kind, blocks)


def rounded(x: Tensor, kind: BlockFormat) -> Tensor:
    """Activations as every kernel rounds them beside weights of this kind."""
    groups = x.view(len(x), -1, kind.block)
    largest = groups.abs().amax(-1, keepdim=True)
    largest = torch.where(largest < 1e-30, 0, largest)
    factors = torch.full_like(largest, 127) / largest  # 127 / largest multiplies with the reciprocal
    numbers = (groups * factors).round().nan_to_num(0, 0, 0)
    return (numbers.double() * (largest / 127)).view(x.shape)


def extremes(rows: int, inputs: int) -> Tensor:
    """Random rows; one of zeros, one with a huge outlier, one of the smallest numbers, one of equal ones."""
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1))
    x[1] = 0
    x[2, inputs // 2] = 3e4
    x[3] *= 1e-38
    x[4] = -1
    return x


# Partial tiles, several spans of groups, one group.
SIZES = pytest.mark.parametrize(("outputs", "inputs"), [(40, 256), (131, 512), (7, 4096 + 512), (16, 256)])


@KINDS
@SIZES
def test_equals_the_plain_sum(kernel: str, kind: BlockFormat, outputs: int, inputs: int) -> None:
    packed, x = random_matrix(kind, outputs, inputs), extremes(9, inputs)
    y = linear(x, packed)
    weights, numbers = packed.restored().double(), rounded(x, kind)
    expected, size = numbers @ weights.T, numbers.abs() @ weights.abs().T
    assert y[1].eq(0).all() and y[3].eq(0).all()
    # Of what was added up; measured worst: 5.8e-6 (Q4_K, whose scales and offsets nearly cancel), 6.5e-7 else
    worst = ((y - expected).abs() / size.clamp_min(1e-30)).max().item()
    print(f"{kernel} {kind.name}: {worst:.1e}")
    assert worst < 1e-5


@KINDS
def test_small_blocks(kernel: str, kind: BlockFormat) -> None:
    if kind is BlockFormat.Q4_K:
        pytest.skip("its blocks are 256 long")
    packed, x = random_matrix(kind, 3, 32), extremes(5, 32)
    expected = rounded(x, kind) @ packed.restored().double().T
    assert torch.allclose(linear(x, packed).double(), expected, rtol=1e-5, atol=1e-6)


@KINDS
def test_a_row_does_not_depend_on_other_rows_or_on_threads(kernel: str, kind: BlockFormat) -> None:
    packed, x = random_matrix(kind, 200, 4096 + 512), extremes(14, 4096 + 512)  # VNNI unpacks from 12 on
    together = linear(x, packed)
    alone = torch.cat([linear(row[None], packed) for row in x])
    assert torch.equal(together, alone)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(linear(x, packed), together)
    finally:
        torch.set_num_threads(threads)


def test_a_group_may_be_cut_short(kernel: str) -> None:
    x, packed = extremes(5, 96)[:, :90], random_matrix(BlockFormat.Q8_0, 20, 96)
    assert torch.equal(linear(x, packed), linear(F.pad(x, (0, 6)), packed))
    for width in (64, 97):
        with pytest.raises(ValueError, match=f"rows of {width} activations do not fit"):
            linear(torch.zeros(2, width), packed)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_mlp_is_its_two_products(kernel: str, activation: str) -> None:
    # Neither strips of outputs nor parts of rows nor the last group are whole.
    rows, hidden = 301, 90
    x = torch.linspace(-12, 12, rows * hidden).view(rows, hidden)
    numbers = (128 + 127 * F.pad(torch.eye(hidden), (0, 6))).to(torch.uint8).view(hidden, -1, GROUP)
    scales = torch.full((hidden, numbers.shape[1], 1), 1 / 127, dtype=torch.float16)
    up = pack(BlockFormat.Q8_0, Parts(numbers, scales))
    down = random_matrix(BlockFormat.Q8_0, 60, 96)
    biases = torch.linspace(-0.1, 0.1, hidden), torch.linspace(-1, 1, 60)
    y = mlp(x, up, biases[0], down, biases[1], activation)
    activated = F.pad(ACTIVATIONS[activation](linear(x, up, biases[0])), (0, 6))
    expected = rounded(activated, down.kind) @ down.restored().double().T + biases[1]
    # Measured worst: 2.8e-7 of the largest; a number on the edge may be rounded to the other side, by 1e-3
    close = {"rtol": 0, "atol": 3e-3 * expected.abs().max().item()}
    assert torch.allclose(y.double(), expected, **close)
    some = torch.cat([mlp(part, up, biases[0], down, biases[1], activation) for part in x[:30].split(7)])
    assert torch.equal(some, y[:30])
    assert mlp(x[:0].bfloat16(), up, None, down, None, activation).shape == (0, 60)
    with pytest.raises(ValueError, match="rows of 60 activations do not fit a matrix of 96"):
        mlp(x, down, None, down, None, activation)
    with pytest.raises(ValueError, match="cannot be in Q4_K"):
        mlp(x, up, None, random_matrix(BlockFormat.Q4_K, 60, 256), None, activation)


@KINDS
def test_all_kernels_agree(kernel: str, kind: BlockFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = random_matrix(kind, 77, 1024), extremes(6, 1024)
    result = linear(x, packed)
    code, reason = loader.compiled("plain")
    if code is None:
        pytest.skip(reason)
    monkeypatch.setattr(compute, "library", lambda: code)
    plain = linear(x, packed)
    assert ((result - plain).abs().amax(1) <= 1e-5 * plain.abs().amax(1)).all()


def test_the_bias_and_the_shape_are_kept(kernel: str) -> None:
    packed, bias = random_matrix(BlockFormat.Q8_0, 20, 64), torch.randn(20)
    x = torch.randn(2, 3, 64)
    y = linear(x, packed, bias)
    assert y.shape == (2, 3, 20)
    assert torch.allclose(y, linear(x, packed) + bias, atol=1e-6)
    assert linear(x.bfloat16(), packed).dtype == torch.bfloat16
    assert linear(x[:0], packed).shape == (0, 3, 20)


@KINDS
def test_without_compiled_code_weights_are_restored(
    kind: BlockFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "library", lambda: None)
    packed, x = random_matrix(kind, 33, 512), torch.randn(4, 512)
    assert torch.equal(linear(x, packed), x @ packed.restored().T)


def test_gradients_pass_through(kernel: str) -> None:
    packed, x = random_matrix(BlockFormat.Q4_1, 8, 64), torch.randn(2, 64, requires_grad=True)
    linear(x, packed).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, packed.restored().sum(0).expand(2, -1), rtol=1e-5)


def test_quantising_needs_no_compiled_code_to_agree() -> None:
    """Compiled code and PyTorch give the same 8 bits, and 4 bits of about the same error."""
    if loader.compiled("packed")[0] is None:
        pytest.skip(loader.compiled("packed")[1])
    weight = torch.randn(48, 512, generator=torch.Generator().manual_seed(3))
    weight[5] = 0
    weight[6, ::100] = 40
    for kind in (BlockFormat.Q8_0, BlockFormat.Q4_1, BlockFormat.Q4_K):
        compiled, in_pytorch = quantize(weight, kind), compute._quantize_in_pytorch(weight, kind, "")
        if kind is BlockFormat.Q8_0:
            assert torch.equal(compiled.data, in_pytorch.data)
        errors = [(packed.restored() - weight).norm() / weight.norm() for packed in (compiled, in_pytorch)]
        print(kind.name, errors)
        assert errors[0] <= errors[1] * 1.02
        assert compiled.restored()[5].eq(0).all()
