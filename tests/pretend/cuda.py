"""A pretend CUDA device. run.py loads the compiled cuda.cpp before torch, then this module.

Tensors on "cuda:0" hold real values in host memory, autograd runs its device threads, and `autocast("cuda")`
and `is_cuda` take effect. What a GPU refuses is refused: operations that mix devices, and `.numpy()`. What a
GPU would wait for is counted: `.item()`, `nonzero`, copies from pageable memory. It cannot show the limits of
real kernels, TF32, nondeterminism, memory, NCCL or races between streams.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.cuda.amp import common
from torch.utils._pytree import tree_leaves, tree_map

to_cuda, to_cpu = torch.ops.pretend.to_cuda, torch.ops.pretend.to_cpu
generator = torch.Generator().manual_seed(0)  # the device's
properties = SimpleNamespace(name="NVIDIA A100-SXM4-80GB", total_memory=80 * 10**9, major=8, minor=0)
free_bytes = [70 * 10**9]
kept_bytes = [0]  # that PyTorch keeps of freed tensors; the driver does not count them as free
flash_attention = [True]  # whether this PyTorch was built with it
current = [0]  # the GPU that the thread has chosen

cublas_setting: list[str | None] = []  # once there was a product
moved_bytes = [0]  # from the host to the device
waits: Counter[tuple[str, str]] = Counter()  # (operation, file:line) -> times that the host waits
attention: list[tuple[int, int]] = []  # (queries, sequences) of each call of the variable-length kernel
_watching = [False]

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"}  # by cuBLAS
# These take indices of the host.
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


@contextlib.contextmanager
def watch() -> Iterator[Counter[tuple[str, str]]]:
    """Count the waits inside, by operation and line of Pumice."""
    waits.clear()
    attention.clear()
    _watching[0] = True
    try:
        yield waits
    finally:
        _watching[0] = False


def _where() -> str:
    for frame in reversed(traceback.extract_stack()):
        if "/pumice/" in frame.filename:
            return f"{frame.filename.rpartition('/pumice/')[2]}:{frame.lineno}"
    return "autograd"


def _wait(name: str) -> None:
    if _watching[0]:
        waits[name, _where()] += 1


def _on(x: Any, device: str) -> bool:
    return isinstance(x, Tensor) and x.device.type == device


def _mixed(name: str) -> RuntimeError:
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({name}, {_where()})"
    )


def _fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation on the host and put its results on the device."""
    name = op._schema.name.partition("::")[2]
    leaves = tree_leaves((args, kwargs))
    # 1. Refuse and count as a GPU would. Tensors without dimensions may stay on the host.
    if any(_on(x, "cpu") and x.dim() for x in leaves) and any(_on(x, "cuda") for x in leaves):
        if name not in INDEXING:
            raise _mixed(name)
        _wait(f"{name} by the host's indices")
    by_mask = name in INDEXING and any(
        _on(x, "cuda") and x.dtype in (torch.bool, torch.uint8) for x in leaves[1:]
    )
    if name in WAITING or by_mask:
        _wait(name)
    if name in PRODUCTS:
        _check_cublas()

    # 2. The same arguments on the host. `out` arguments that are empty are grown and given back below.
    def host(x: Any) -> Any:
        if isinstance(x, torch.device) and x.type == "cuda":
            return torch.device("cpu")
        return to_cpu(x) if _on(x, "cuda") else x

    host_args, host_kwargs = tree_map(host, (args, kwargs))
    schema = op._schema
    host_args = tuple(
        torch.scalar_tensor(x, dtype=torch.result_type(x, x))
        if type(x) in (int, float, bool) and str(argument.type) == "Tensor"
        else x
        for x, argument in zip(host_args, schema.arguments, strict=False)
    )
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    grown = {
        a.name: torch.empty(0, dtype=kwargs[a.name].dtype)
        for a in written
        if a.kwarg_only and _on(kwargs.get(a.name), "cuda") and not kwargs[a.name].numel()
    }
    host_kwargs |= grown
    # 3. Run it. An operation that draws uses the device's own generator.
    draws = torch.Tag.nondeterministic_seeded in op.tags and not any(
        isinstance(x, torch.Generator) for x in leaves
    )
    with _device_generator() if draws else contextlib.nullcontext():
        out = _KERNELS.get(name, op)(*host_args, **host_kwargs)
    for name, tensor in grown.items():
        torch.ops.pretend.assign(kwargs[name], tensor)
    # 4. Results that are arguments keep their identity; others go to the device.
    values = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    aliases = {letter: values.get(a.name) for a in written for letter in a.alias_info.before_set}
    if not schema.returns:
        return None
    if len(schema.returns) == 1 and isinstance(out, list | tuple):
        return [to_cuda(x) for x in out]
    outs = out if len(schema.returns) > 1 else (out,)
    results = tuple(
        aliases[next(iter(r.alias_info.before_set))]
        if r.alias_info is not None and r.alias_info.is_write
        else to_cuda(x)
        if isinstance(x, Tensor)
        else x
        for r, x in zip(schema.returns, outs, strict=True)
    )
    return results if len(results) > 1 else results[0]


def _check_cublas() -> None:
    """Refuse what cuBLAS refuses. It reads its setting before the first product (ATen/Context.cpp)."""
    if not cublas_setting:
        cublas_setting.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
    if torch.are_deterministic_algorithms_enabled() and cublas_setting[0] not in (":4096:8", ":16:8"):
        raise RuntimeError("this operation is not deterministic because it uses CuBLAS and CUDA >= 10.2")


@contextlib.contextmanager
def _device_generator() -> Iterator[None]:
    host_state = torch.random.default_generator.get_state()
    torch.random.default_generator.set_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.random.default_generator.get_state())
        torch.random.default_generator.set_state(host_state)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if _on(source, "cuda") and not _on(target, "cuda"):
        _wait("copy to the host")
    elif not _on(source, "cuda"):
        moved_bytes[0] += target.nbytes
        if not (source.is_pinned() and non_blocking):
            _wait("copy from pageable memory" if not source.is_pinned() else "blocking copy")
    torch.ops.aten.copy_.default(*(to_cpu(x) if _on(x, "cuda") else x for x in (target, source)))
    return target


def _empty(
    size: Any,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> Tensor:
    return to_cuda(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(
    size: Any,
    stride: Any,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
) -> Tensor:
    return to_cuda(torch.empty_strided(size, stride, dtype=dtype))


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    if not all(_on(t, "cuda") for t in (x, weight) + (() if bias is None else (bias,))):
        raise _mixed("convolution")
    tensors = (to_cpu(x), to_cpu(weight), None if bias is None else to_cpu(bias))
    return to_cuda(torch.ops.aten.convolution.default(*tensors, *options))


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *options: Any
) -> tuple[Tensor | None, ...]:
    grads = torch.ops.aten.convolution_backward.default(to_cpu(grad), to_cpu(x), to_cpu(weight), *options)
    return tuple(None if g is None else to_cuda(g) for g in grads)


def _scores(q: Tensor, k: Tensor, causal: bool, left: int | None, scale: float) -> Tensor:
    """Return the masked scores (H, r, S) of queries (H, r, d), the last of which see the last key."""
    scores = q @ k.transpose(1, 2) * scale
    queries, keys = scores.shape[1:]
    distance = torch.arange(queries)[:, None] + (keys - queries) - torch.arange(keys)
    if causal:
        scores = scores.masked_fill(distance < 0, float("-inf"))
    if left is not None and left >= 0:
        scores = scores.masked_fill(distance > left, float("-inf"))
    return scores


def _sequences(
    q: Tensor, k: Tensor, starts: Tensor, key_starts: Tensor | None, used: Tensor | None, table: Any
) -> Any:
    """Yield the rows of q, and the rows of k and v as an index, of each sequence."""
    for n in range(len(starts) - 1):
        rows = slice(int(starts[n]), int(starts[n + 1]))
        if table is not None:
            page = k.shape[1]
            positions = torch.arange(int(used[n]))
            yield rows, table[n].long()[positions // page] * page + positions % page
        else:
            first = int(key_starts[n])
            yield rows, torch.arange(first, int(key_starts[n + 1]) if used is None else first + int(used[n]))


def _flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    key_starts: Tensor | None,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    debug: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, ...]:
    """FlashAttention's kernel for sequences of different lengths, as it is documented."""
    if not flash_attention[0]:
        raise RuntimeError("USE_FLASH_ATTENTION was not enabled for build.")
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise RuntimeError(f"FlashAttention only support fp16 and bf16, got {q.dtype}, {k.dtype}, {v.dtype}")
    if block_table is not None and k.shape[1] % 256:
        raise RuntimeError("Paged KV cache block size must be divisible by 256")
    attention.append((len(q), len(starts) - 1))
    out, logsumexp = torch.empty_like(q), torch.zeros(q.shape[1], q.shape[0])
    flat_k, flat_v = (x.flatten(0, 1) if block_table is not None else x for x in (k, v))
    groups = q.shape[1] // k.shape[-2]
    for rows, keys in _sequences(q, k, starts, key_starts, seqused_k, block_table):
        queries = q[rows].float().transpose(0, 1)
        seen_k, seen_v = (
            x[keys].float().transpose(0, 1).repeat_interleave(groups, 0) for x in (flat_k, flat_v)
        )
        causal_left = window_size_left if window_size_right == 0 else None
        scores = _scores(
            queries, seen_k, causal or window_size_right == 0, causal_left, scale or q.shape[-1] ** -0.5
        )
        logsumexp[:, rows] = scores.logsumexp(-1)
        out[rows] = (scores.softmax(-1) @ seen_v).transpose(0, 1).to(q.dtype)
    empty = torch.zeros(2, dtype=torch.uint64)
    return out, logsumexp, empty, empty, torch.zeros(0)


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    rng: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
    groups, factor = q.shape[1] // k.shape[1], scale or q.shape[-1] ** -0.5
    for rows, keys in _sequences(q, k, starts, key_starts, None, None):
        queries, outs, grads = (x[rows].float().transpose(0, 1) for x in (q, out, grad))
        seen_k, seen_v = (x[keys].float().transpose(0, 1).repeat_interleave(groups, 0) for x in (k, v))
        causal_left = window_size_left if window_size_right == 0 else None
        scores = _scores(queries, seen_k, causal or window_size_right == 0, causal_left, factor)
        shares = (scores - logsumexp[:, rows][..., None]).exp()
        slopes = shares * (grads @ seen_v.transpose(1, 2) - (grads * outs).sum(-1, keepdim=True)) * factor
        dq[rows] += (slopes @ seen_k).transpose(0, 1)
        for total, part in ((dk, slopes.transpose(1, 2) @ queries), (dv, shares.transpose(1, 2) @ grads)):
            total[keys] += part.unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


_KERNELS = {"_flash_attention_forward": _flash_forward, "_flash_attention_backward": _flash_backward}

_every_operation = torch.library.Library("_", "IMPL")
_every_operation.fallback(_fallback, "CUDA")
_aten = torch.library.Library("aten", "IMPL")
for _name, _function in {
    "copy_": _copy,
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
}.items():
    _aten.impl(_name, _function, "CUDA")


def _exchange_device(device: int) -> int:
    before = current[0]
    if device >= 0:
        current[0] = device
    return before


def _maybe_exchange_device(device: int) -> int:  # another function: the compiler has a handler for each
    return _exchange_device(device)


# torch.cuda, as far as Pumice and PyTorch's own Python ask it.
torch._C._set_only_lift_cpu_tensors(False)
torch._C._cuda_getCurrentRawStream = lambda device=0: 0
for _name, _value in {
    "_lazy_init": None,
    "is_available": True,
    "is_initialized": True,
    "_is_compiled": True,
    "device_count": 1,
    "current_device": 0,
    "set_device": None,
    "get_device_properties": properties,
    "is_bf16_supported": True,
    "_is_in_bad_fork": False,
    "synchronize": None,
    "is_current_stream_capturing": False,
    "empty_cache": None,
    "reset_peak_memory_stats": None,
    "max_memory_allocated": 0,
    "memory_allocated": 0,
}.items():
    setattr(torch.cuda, _name, lambda *_, value=_value, **__: value)
torch.cuda._initialized = True
torch.cuda.get_device_name = lambda device=None: properties.name
torch.cuda.get_device_capability = lambda device=None: (properties.major, properties.minor)
torch.cuda.mem_get_info = lambda device=None: (free_bytes[0], properties.total_memory)
torch.cuda._exchange_device = _exchange_device
torch.cuda._maybe_exchange_device = _maybe_exchange_device
torch.cuda.memory_reserved = lambda device=None: kept_bytes[0]
torch.backends.cuda.is_flash_attention_available = lambda: flash_attention[0]
torch.cuda.get_rng_state = lambda device=None: generator.get_state()
torch.cuda.set_rng_state = lambda state, device=None: generator.set_state(state)
torch.cuda.manual_seed = torch.cuda.manual_seed_all = generator.manual_seed
common.amp_definitely_not_available = lambda: False
