"""Build a model that runs: from any source that `read` recognises, or from a tower and a language model."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from pumice import __version__
from pumice.config import ConnectorConfig, ImagePolicy, ModelConfig
from pumice.config_json import as_stored, from_dict
from pumice.errors import InputError
from pumice.formats.components import open_llm, open_tower
from pumice.formats.hf.config import padding
from pumice.formats.pumice.folder import CONFIG, WEIGHTS, check
from pumice.formats.pumice.quantized import cached
from pumice.formats.quantize import can_quantize, quantize_state, stored_in_blocks
from pumice.formats.read import BUILT_IN, read_model, read_or_outline
from pumice.formats.recognise import FormatKind, recognise
from pumice.formats.sizes import check_memory
from pumice.kernels import compute
from pumice.kernels.allocator import return_freed_memory
from pumice.kernels.packed import LAYOUT, PackedMatrix
from pumice.model.adapters import merge_lora
from pumice.model.connector import Connector, check_image_tokens
from pumice.model.llava import Llava
from pumice.model.quantized import swap
from pumice.model.quantized_vision import quantize_vision
from pumice.model.varlen import OLDEST_CAPABILITY, is_recent
from pumice.model.vision import WideningLinear
from pumice.processor import Processor
from pumice.storage.download import weight_files, wheel
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import MAPPED_BYTES, LazyStateDict, LazyTensor, as_lazy, close_last_file
from pumice.tokens import Tokenizer

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A model with the processor of its input and a record of its origin."""

    model: Llava
    processor: Processor
    loaded: LoadedParts  # what it was built from, its tensors as they are stored

    @property
    def provenance(self) -> dict[str, Any]:
        return self.loaded.provenance


def open_model(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    merge: bool = True,
    quantize: str | None = None,
    template: str | None = None,
    tower: str | None = None,
    base: str | None = None,
    mmproj: str | PathLike[str] | None = None,
    cache_limit: float | None = None,
    cache_tokens: int | None = None,
) -> Opened:
    """Open a model in evaluation mode; no parameter requires a gradient.

    source, template, tower, base, mmproj: as `read_model` takes them. dtype: of the decoder; the tower and
    the connector compute in fp32 on a CPU. merge: fold LoRA into the weights, as answering wants it; a ViT's
    weights then stay in the type they are stored in. quantize: "int8" or "int4" quantises the decoder's
    matrices, with adapters merged, and on a CPU that multiplies integers fast those of a ViT's MLPs to 8
    bits. "auto" does so on a CPU with compiled code: to int8, or as they are stored. cache_limit: the GB that
    converted GGUF files may take in the cache, $PUMICE_CACHE_LIMIT if None.
    cache_tokens: of the KV cache that the model gets on a GPU; None: it is as large as fits. One matrix at a
    time is read and quantised, by the CPU. Those that are stored quantised stay as they are; on a CPU their
    files are mapped. Assumptions are logged. Raises InputError if a part is missing, extra, misshapen or
    cannot be downloaded, or where memory does not suffice.
    """
    device = torch.device(device)
    loaded, missing = read_or_outline(source, template=template, tower=tower, base=base, mmproj=mmproj)
    if missing:
        # Refuse what will not fit before it is fetched, as `build` does.
        kind = _kind(loaded, quantize, device)
        held = torch.float32 if kind is not None and device.type == "cpu" else dtype
        # Matrices of a GGUF file are mapped from a copy in the cache, which a CPU may have no memory for.
        is_mapped = device.type == "cpu" and kind is not None and loaded.sources["model"][1].suffix == ".gguf"
        if not is_mapped:
            check_memory(loaded, str(source), kind, device, held, cache_tokens)
        loaded = read_model(source, template=template, tower=tower, base=base, mmproj=mmproj)
    return build(
        loaded, str(source), device, dtype, merge=merge, quantize=quantize,
        cache_limit=cache_limit, cache_tokens=cache_tokens,
    )  # fmt: skip


def build(
    loaded: LoadedParts,
    label: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    merge: bool,
    quantize: str | None = None,
    cache_limit: float | None = None,
    cache_tokens: int | None = None,
) -> Opened:
    """Build a model from its parts, as `open_model` does. label: names it in errors."""
    for note in loaded.notes:
        _LOG.warning("%s: %s", label, note)
    on_cpu = device.type == "cpu"
    quantize = _kind(loaded, quantize, device)
    # 1. Refuse what does not fit. On a CPU, quantised weights that are mapped need no memory of their own.
    if quantize is None or not on_cpu:
        check_memory(loaded, label, quantize, device, dtype, cache_tokens)
    processor = Processor(loaded.config, Tokenizer(loaded.tokenizer))
    if quantize is None:
        return Opened(_build(loaded, label, device, dtype, merge), processor, loaded)
    # 2. Quantise, with adapters merged.
    state = _quantized(loaded, label, quantize, cache_limit)
    merged = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, lora=None), state=state)
    if on_cpu:
        dtype = torch.float32  # of activations, norms and biases
        check_memory(merged, label, quantize, device, dtype)
    model = _build_quantized(merged, device, dtype)
    model.config = loaded.config
    return Opened(model, processor, loaded)


def _kind(loaded: LoadedParts, quantize: str | None, device: torch.device) -> str | None:
    """Return what "auto" means for this model and device; any other kind of weights stays."""
    if quantize != "auto":
        return quantize
    # Without compiled code, quantised weights save memory but no time. So it quantises only if the model is
    # stored so.
    worthwhile = compute.library() is not None or stored_in_blocks(loaded.config, loaded.state)
    return "int8" if device.type == "cpu" and worthwhile and can_quantize(loaded.config.decoder) else None


def new_parts(
    tower: str,
    decoder: str,
    *,
    vision: Mapping[str, Any] | None = None,
    connector: Mapping[str, Any] | None = None,
    image: Mapping[str, Any] | None = None,
    template: str | None = None,
) -> LoadedParts:
    """Read a vision tower and an LLM, and draw a new connector from torch's random generator.

    tower, decoder: known wheels, folders, files or hub names. vision, connector, image: fields of their
    configs, which override what the tower's folder says. template: the chat format; by default the one that
    the LLM's chat template describes. Raises InputError.
    """
    # 1. Open both. Their tensors are read later.
    vision_tower = open_tower(tower, vision)
    language = open_llm(decoder)
    # 2. How pictures are prepared: as the tower was trained, unless the caller says otherwise. Padding has
    # the colour of the mean, which normalises to zero.
    policy = dict(image or {})
    image_policy = from_dict(ImagePolicy, as_stored(vision_tower.policy) | policy, "image")
    if "pad_color" not in policy and vision_tower.wheel is None:
        image_policy = dataclasses.replace(image_policy, pad_color=padding(image_policy.mean))
    config, notes = language.text.model_config(
        template, decoder, decoder=language.config, vision=vision_tower.config,
        connector=from_dict(ConnectorConfig, dict(connector or {}), "connector"), image=image_policy,
        trained_pictures=0,
    )  # fmt: skip
    # 3. One state dict. Only the connector and the newline are new; the order of drawing decides their
    # values.
    state = {f"tower.{name}": tensor for name, tensor in vision_tower.state.items()}
    state |= _drawn(config)
    state |= {f"decoder.{name}": tensor for name, tensor in language.state.items()}
    if config.has_newline:
        state["image_newline"] = as_lazy(torch.randn(config.decoder.width) * config.decoder.width**-0.5)
    wheels = {"tower": vision_tower.wheel, "decoder": language.wheel}
    parts = {part: wheel for part, wheel in wheels.items() if wheel is not None}
    sources = {"model": (decoder, language.path), "tower": (tower, vision_tower.path)}
    return language.text.parts(config, state, (*language.notes, *notes), parts=parts, sources=sources)


def with_connector(loaded: LoadedParts, fields: Mapping[str, Any]) -> LoadedParts:
    """Return the model with a new connector, drawn from torch's random generator.

    fields: of ConnectorConfig. Raises InputError if it does not fit the tower.
    """
    connector = from_dict(ConnectorConfig, dict(fields), "connector")
    config = dataclasses.replace(loaded.config, connector=connector)
    state = {name: tensor for name, tensor in loaded.state.items() if not name.startswith("connector.")}
    return dataclasses.replace(loaded, config=config, state=state | _drawn(config))


def _drawn(config: ModelConfig) -> LazyStateDict:
    """Return the tensors of a new, untrained connector."""
    new = Connector(config.connector, config.vision.width, config.decoder.width)
    check_image_tokens(config)
    return {f"connector.{name}": as_lazy(tensor) for name, tensor in new.state_dict().items()}


def _follow_products(device: torch.device, dtype: torch.dtype) -> None:
    """Let cuDNN round fp32 to TF32 only where matrix products do. It does so unless it is told not to."""
    if device.type == "cuda" and dtype == torch.float32:
        torch.backends.cudnn.allow_tf32 = torch.get_float32_matmul_precision() != "highest"


def _build(loaded: LoadedParts, label: str, device: torch.device, dtype: torch.dtype, merge: bool) -> Llava:
    model = _empty_model(loaded.config)
    check(loaded.state, _shapes(model), label)
    _fill(model, loaded.state, device, dtype, as_stored=merge)
    if merge:
        merge_lora(model.decoder)
        return_freed_memory()  # the weights before merging
    return model


def _quantized(loaded: LoadedParts, label: str, bits: str, cache_limit: float | None) -> LazyStateDict:
    """Return the tensors with adapters merged and the decoder's matrices quantised, or from the cache."""
    check(loaded.state, shapes(loaded.config), label)
    source = loaded.sources["model"][1] if "model" in loaded.sources else None
    built_in = source is not None and source.parent == BUILT_IN
    in_gguf = source is not None and not built_in and recognise(source) is FormatKind.GGUF
    hint = (
        f"{label} is quantised at every start; `pumice import {shlex.quote(label)} FOLDER --quantize {bits}` "
        "stores it quantised, and FOLDER opens at once"
    )
    state = quantize_state(loaded.config, loaded.state, bits, "" if built_in or in_gguf else hint)
    if source is None or not (built_in or in_gguf):
        return state
    # What comes out is the same at every start.
    key = _key(source, loaded.parts, bits) if built_in else _gguf_key(weight_files(source), bits)
    limit = None if cache_limit is None else cache_limit * 1e9
    return cached(key, state, limit, "" if built_in else label)


def _build_quantized(loaded: LoadedParts, device: torch.device, dtype: torch.dtype) -> Llava:
    """loaded: of `_quantized`'s tensors, which it takes one by one. dtype: of what is not quantised."""
    model, state = _empty_model(loaded.config), loaded.state

    def packed(name: str, _: torch.Tensor) -> PackedMatrix:
        blocks = state.pop(f"decoder.{name}").blocks
        assert blocks is not None
        matrix = blocks.fetch()
        return dataclasses.replace(matrix, data=matrix.data.to(device))

    swap(model.decoder, packed, dtype)
    if device.type == "cpu":
        quantize_vision(model.tower, lambda name: state.pop(f"tower.{name}").read())
    _fill(model, state, device, dtype, as_stored=True)
    return model


def _key(source: Path, parts: Mapping[str, str], bits: str) -> str:
    """Return a hash of everything that determines a built-in model's quantised matrices."""
    digest = hashlib.sha256(_layout(bits))
    for name in (CONFIG, WEIGHTS):
        digest.update((source / name).read_bytes())
    for name in parts.values():
        digest.update(wheel(name).sha256.encode())
    return digest.hexdigest()[:16]


def _gguf_key(files: Sequence[Path], bits: str) -> str:
    """Return a hash of what determines the quantised matrices of GGUF files; most bytes are not read.

    A file is known by its size, its time of change, and pieces of its contents.
    """
    digest = hashlib.sha256(_layout(bits))
    for path in files:
        status = path.stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            for place in range(0, status.st_size, max(1, status.st_size // 64)):
                file.seek(place)
                digest.update(file.read(1 << 12))
    return digest.hexdigest()[:16]


def _layout(bits: str) -> bytes:
    """Return what determines the layout of quantised matrices, as bytes for a hash."""
    return f"{__version__} {LAYOUT} {bits} {compute.kernel_name()}".encode()


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a model of this config has, by name."""
    return _shapes(_empty_model(config))


def _shapes(model: Llava) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _empty_model(config: ModelConfig) -> Llava:
    """Return the modules without values, so that no weight is drawn only to be replaced."""
    with torch.device("meta"):
        return Llava(config)


def _fill(
    model: Llava, state: LazyStateDict, device: torch.device, dtype: torch.dtype, *, as_stored: bool = False
) -> None:
    """Load checked tensors into the model.

    as_stored: keep 16-bit weights of layers that widen them when they compute (`WideningLinear`). Tensors are
    read one at a time: besides the model, only the pages of one file are in memory.
    """
    _follow_products(device, dtype)
    # On a CPU the tower and the connector compute in fp32; half precision is slow there and less exact. On
    # meta they are as on the CPU that will fill them.
    tower_dtype = torch.float32 if device.type in ("cpu", "meta") else dtype
    widened = [name for name, part in model.named_modules() if isinstance(part, WideningLinear)]
    narrow = {f"{name}.weight" for name in widened if as_stored and tower_dtype == torch.float32}

    def dtype_of(name: str) -> torch.dtype:
        if name in narrow and state[name].dtype in (torch.float16, torch.bfloat16):
            return state[name].dtype
        if name.endswith((".lora_a", ".lora_b")):
            return torch.float32  # adapters are merged or trained further, and both need full precision
        return dtype if name.startswith("decoder.") else tower_dtype

    def read(name: str, tensor: LazyTensor) -> torch.Tensor:
        if device.type == "meta":  # of a process that gets its values from another one
            return torch.empty(tensor.shape, dtype=dtype_of(name), device=device)
        return tensor.read(dtype_of(name)).to(device)

    # A tensor that keeps its type is a view of the mapped file, which then stays in memory. It is read from a
    # mapping that is opened after the others were converted, so that their pages do not stay with it.
    tensors = {}
    for name, tensor in state.items():
        if dtype_of(name) != tensor.dtype:
            tensors[name] = read(name, tensor)
            close_last_file(MAPPED_BYTES)
    close_last_file(1)
    tensors |= {name: read(name, tensor) for name, tensor in state.items() if name not in tensors}
    model.load_state_dict(tensors, assign=True)
    model.requires_grad_(False).eval()


def name_of(source: str | PathLike[str], provenance: Mapping[str, Any]) -> str:
    """Return what to call a model: its source or, where that is a run's folder `model`, its last recipe."""
    stages = provenance.get("stages")
    if Path(source).resolve().name != "model" or not isinstance(stages, list) or not stages:
        return str(source)
    recipe = stages[-1].get("recipe") if isinstance(stages[-1], dict) else None
    name = recipe.get("name") if isinstance(recipe, dict) else None
    return name if isinstance(name, str) and name else str(source)


def usual_dtype(device: torch.device) -> torch.dtype:
    """Return the type in which a decoder answers on a device, unless the caller names another."""
    if device.type == "cuda":
        return torch.bfloat16 if is_recent(device) else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32  # most CPUs compute it faster than bf16


def check_bf16(device: torch.device, remedy: str) -> None:
    """Raise InputError if the device is a GPU too old for bfloat16; `remedy` ends the sentence."""
    if device.type == "cuda" and not is_recent(device):
        found, needed = (
            ".".join(map(str, pair)) for pair in (torch.cuda.get_device_capability(device), OLDEST_CAPABILITY)
        )
        raise InputError(
            f"{torch.cuda.get_device_name(device)} has compute capability {found}, bfloat16 needs {needed}; "
            f"{remedy}"
        )


def find_device(name: str | None = None) -> torch.device:
    """Return the named device, or the fastest one available. Raises InputError if it is not available."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} is not available here; try 'cpu'") from error
    return device
