"""Estimate what one answer costs on this machine: memory by part, seconds to the first word, tokens a second.

A few layers of the model's shapes, with numbers that mean nothing, are timed through the code that answers.
The rest is counted: all layers of a decoder take equally long.

Shapes: T tokens of the prompt, D width, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from pumice.config import DecoderConfig, ModelConfig
from pumice.conversation import Conversation, user_message
from pumice.engine.native import native_decoder
from pumice.formats.load import find_device
from pumice.formats.quantize import can_quantize
from pumice.formats.read import read_model
from pumice.formats.sizes import PROCESS_BYTES, cache_dtype, weight_sizes
from pumice.kernels.compute import kernel_name
from pumice.kernels.packed import PackedMatrix, packed_size
from pumice.model.cache import BLOCK, KVCache, Segment
from pumice.model.decoder import Decoder
from pumice.model.llava import Llava
from pumice.model.quantized import KINDS, PackedLinear, kind_of, swap
from pumice.model.vision import WideningLinear
from pumice.processor import Processor
from pumice.storage.memory import available_memory
from pumice.storage.parts import LoadedParts
from pumice.tokens import Tokenizer

ANSWER = 256  # tokens of the longest answer of `pumice ask`
CHUNK = 512  # prompt tokens of a step
# Layers are timed until they hold so many bytes: fewer would stay in the processor's cache.
PROBE_BYTES = 128 << 20
QUESTION = "What is in this picture?"


@dataclass(frozen=True)
class AskCost:
    """What answers cost with weights of one kind. quantize: "none", "int8" or "int4".

    memory: part -> bytes. first_word: seconds, of a picture that was not asked about before.
    """

    quantize: str
    memory: dict[str, float]
    first_word: float
    tokens_per_second: float
    fits: bool | None  # None where the free memory is unknown

    @property
    def total(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True)
class AskPlan:
    """The costs of all kinds of weights. free: bytes of memory; None if unknown."""

    model: str
    device: str
    threads: int
    kernel: str
    free: float | None
    prompt_tokens: int
    image_tokens: int
    costs: tuple[AskCost, ...]

    def to_dict(self) -> dict[str, Any]:
        costs = [{**asdict(cost), "total": cost.total} for cost in self.costs]
        return {**asdict(self), "costs": costs}


def plan_ask(source: str, device: str | None = None) -> AskPlan:
    """Estimate the answers of a model, whose tensors are not read. Raises InputError."""
    loaded = read_model(source)
    place = find_device(device)
    if place.type == "cuda":
        free: float | None = float(torch.cuda.mem_get_info(place)[0])
    else:
        free = available_memory()
    with torch.inference_mode():
        # 1. The prompt of a question about a usual picture, and how long tower and connector take for it.
        prompt_tokens, image_tokens, image_seconds = _measure_image(loaded, place)
        # 2. The language model, with weights of each kind.
        kinds = [None, *(KINDS if can_quantize(loaded.config.decoder) else ())]
        costs = tuple(_cost(loaded, kind, place, free, prompt_tokens, image_seconds) for kind in kinds)
    return AskPlan(
        source, place.type, torch.get_num_threads(), kernel_name(), free, prompt_tokens, image_tokens, costs
    )


def _cost(
    loaded: LoadedParts,
    quantize: str | None,
    device: torch.device,
    free: float | None,
    prompt_tokens: int,
    image_seconds: float,
) -> AskCost:
    config = loaded.config.decoder
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    # 1. Memory: weights, the cells that the prompt and the longest answer use, and the buffers of a step.
    cells = min(config.context, -(-(prompt_tokens + ANSWER) // BLOCK) * BLOCK)
    token_bytes = KVCache.bytes_per_token(config, cache_dtype(quantize, device, dtype))
    step_bytes = min(CHUNK, prompt_tokens) * (3 * config.mlp_width + 8 * config.width) * 4
    memory: dict[str, float] = dict(weight_sizes(loaded, quantize, device, dtype))
    memory["KV cache"] = cells * token_bytes
    memory["program and buffers"] = (PROCESS_BYTES if device.type == "cpu" else 0.0) + step_bytes
    # 2. Time.
    prefill, token = measure_decoder(config, quantize, prompt_tokens, device, dtype)
    fits = None if free is None else sum(memory.values()) <= free
    return AskCost(quantize or "none", memory, image_seconds + prefill, 1 / token, fits)


def measure_decoder(
    config: DecoderConfig, quantize: str | None, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Return the seconds that a prompt of T tokens takes, and those of each token of its answer."""
    # 1. As many layers as are timed together.
    weight_bytes = 1.0 if quantize == "int8" else 0.6 if quantize else float(dtype.itemsize)
    inner, shared = config.heads * config.head_dim, config.kv_heads * config.head_dim
    layer_weights = config.width * (2 * inner + 2 * shared + 3 * config.mlp_width)
    depth = min(config.depth, math.ceil(PROBE_BYTES / (layer_weights * weight_bytes)))
    decoder = _probe(replace(config, depth=depth, vocab_size=64), quantize, device, dtype)
    # 2. The prompt in chunks, through PyTorch. The first pass gets memory and threads ready.
    chunk = min(tokens, CHUNK)
    cache = KVCache(decoder.config, chunk + BLOCK, device, cache_dtype(quantize, device, dtype))
    cache.keys.zero_()
    cache.values.zero_()
    table, last = list(range(cache.blocks)), torch.tensor([0], device=device)

    def forward(past: int, count: int) -> object:
        segments = [Segment(table, past, count)]
        x = torch.ones(1, count, config.width, device=device, dtype=dtype)
        positions, attend = cache.positions(segments), cache.attend(segments)
        return decoder.logits(decoder(x, positions, attend, rows=last))

    forward(0, min(16, chunk))
    prefill = _seconds(forward, 0, chunk, rounds=1, device=device)
    # 3. A token, through compiled code where there is some.
    native = native_decoder(decoder, cache)
    if native is None:
        token = _seconds(forward, chunk, 1, rounds=7, device=device)
    else:
        row = torch.ones(1, config.width)
        token = _seconds(native.logits, row, [Segment(table, chunk, 1)], [0], rounds=7, device=device)
    # 4. The vocabulary projection comes once, whatever the depth.
    head = _layer(config.vocab_size, config.width, "int8" if quantize else None, device, dtype)
    row = torch.ones(1, config.width, device=device, dtype=dtype)
    head_seconds = _seconds(head, row, rounds=5, device=device)
    scale = config.depth / depth
    return prefill * scale * tokens / chunk + head_seconds, token * scale + head_seconds


def _probe(config: DecoderConfig, quantize: str | None, device: torch.device, dtype: torch.dtype) -> Decoder:
    """Return a decoder whose weights are all the same number."""
    with torch.device("meta"):
        decoder = Decoder(config)
    if quantize is not None:
        swap(decoder, lambda name, weight: _constant(name, tuple(weight.shape), quantize), dtype)
    for module in decoder.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                # Written, not only reserved: memory that was never written is not read from memory.
                values = torch.full(parameter.shape, 0.01, device=device, dtype=dtype)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
    return decoder.to(device).eval()


def _constant(name: str, shape: tuple[int, ...], quantize: str) -> PackedMatrix:
    kind = kind_of(quantize, name, shape[1])
    data = torch.ones(packed_size(kind, shape[0], shape[1]), dtype=torch.uint8)
    return PackedMatrix(kind, shape[0], shape[1], data)


def _layer(
    outputs: int, inputs: int, quantize: str | None, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    if quantize is not None:
        return PackedLinear(_constant("head.weight", (outputs, inputs), quantize)).to(device)
    layer = nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)
    return layer.requires_grad_(False)


def _measure_image(loaded: LoadedParts, device: torch.device) -> tuple[int, int, float]:
    """Return the tokens of a prompt and of its picture, and the seconds for the picture's tokens."""
    processor = Processor(loaded.config, Tokenizer(loaded.tokenizer))
    images = [] if loaded.config.vision.kind == "none" else [Image.new("RGB", (640, 480), (120, 90, 60))]
    start = time.perf_counter()
    sample = processor.prompt(Conversation((user_message(QUESTION, images),)))
    if not images:
        return len(sample.input_ids), 0, 0.0
    pixels = torch.from_numpy(processor.pixels(sample.images, sample.layouts)).to(device)
    seconds = time.perf_counter() - start
    # A ViT is timed with no block and with two, all others whole.
    vision = loaded.config.vision
    running = vision.layer % (vision.depth + 1) if vision.depth else 0
    encoders = [_encoder(loaded, blocks, device) for blocks in ((0, 2) if running > 2 else (running,))]
    for encoder in encoders:
        encoder.encode(pixels, sample.layouts)
    times = [
        _seconds(encoder.encode, pixels, sample.layouts, rounds=2, device=device) for encoder in encoders
    ]
    seconds += times[0] + (times[-1] - times[0]) / 2 * running
    return len(sample.input_ids), sum(layout.tokens for layout in sample.layouts), seconds


def _encoder(loaded: LoadedParts, blocks: int, device: torch.device) -> Llava:
    """Return a random model with so many blocks of a ViT, and no more of a decoder than it must have."""
    config: ModelConfig = loaded.config
    vision = config.vision
    if vision.depth:
        vision = replace(vision, depth=blocks, layer=blocks)
    decoder = replace(config.decoder, depth=1, vocab_size=64, mlp_width=32)
    model = Llava(replace(config, vision=vision, decoder=decoder, lora=None))
    stored = {tensor.dtype for name, tensor in loaded.state.items() if name.startswith("tower.blocks.")}
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = model.to(device, dtype).requires_grad_(False).eval()
    for module in model.modules():
        if isinstance(module, WideningLinear) and stored & {torch.float16, torch.bfloat16}:
            module.weight.data = module.weight.data.half()
    return model


def _seconds(function: Callable[..., object], *arguments: object, rounds: int, device: torch.device) -> float:
    """Return the median time of some calls."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = function(*arguments)
        if device.type != "cpu" and isinstance(result, Tensor):
            result.flatten()[0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times)
