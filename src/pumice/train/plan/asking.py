"""Estimate what one answer costs on this machine: memory by part, seconds to the first word, tokens a second.

A few layers of the model's shapes, with numbers that mean nothing, are timed through the engine that answers.
The rest is counted: all layers of a decoder take equally long.

Shapes: T tokens of the prompt.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from pumice.assistant import CHUNK_SHOWN
from pumice.config import ConnectorConfig, DecoderConfig, ModelConfig, VisionConfig
from pumice.conversation import Conversation, user_message
from pumice.engine.engine import Engine
from pumice.engine.params import SamplingParams
from pumice.engine.requests import Prompt
from pumice.errors import InputError
from pumice.formats.load import find_device, usual_dtype
from pumice.formats.quantize import can_quantize, kept_below
from pumice.formats.read import read_or_outline
from pumice.formats.sizes import PROCESS_BYTES, cache_dtype, weight_sizes
from pumice.kernels.compute import kernel_name
from pumice.kernels.packed import PackedMatrix, packed_size
from pumice.model.cache import BLOCK, KVCache
from pumice.model.llava import Llava, make_tower
from pumice.model.quantized import KINDS, kind_of, swap
from pumice.model.quantized_vision import quantize_vision, quantized_shapes
from pumice.model.vision import WideningLinear
from pumice.processor import Processor
from pumice.storage.memory import free_on
from pumice.storage.parts import LoadedParts
from pumice.threads import BUSY, busy_load, usable_cores
from pumice.tokens import Tokenizer

ANSWER = 256  # tokens of the longest answer of `pumice ask`
# Layers are timed until they hold so many bytes: fewer would stay in the processor's cache.
PROBE_BYTES = 128 << 20
# An answer of so many tokens is timed up to ROUNDS times, until PROBE_SECONDS are over.
TIMED_TOKENS, ROUNDS, PROBE_SECONDS = 16, 3, 1.0
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
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        costs = [{**asdict(cost), "total": cost.total} for cost in self.costs]
        return {**asdict(self), "costs": costs}


def plan_ask(source: str, device: str | None = None) -> AskPlan:
    """Estimate the answers of a model, whose tensors are neither read nor fetched. Raises InputError."""
    notes = busy_notes()
    loaded, missing = read_or_outline(source)
    if missing:
        notes = (*notes, f"the weights are not here yet: the first question fetches {missing / 1e9:.2f} GB")
    place = find_device(device)
    free = free_on(place)
    with torch.inference_mode():
        # 1. The prompt of a question about a usual picture, and how long tower and connector take for it: as
        #    they are, and as they are beside a quantised language model, where that differs.
        prompt_tokens, image_tokens, image_seconds = _measure_image(loaded, place, quantized=False)
        if prompt_tokens >= loaded.config.decoder.context:
            raise InputError(
                f"'{source}' cannot answer a question about a usual picture: it takes {prompt_tokens} tokens "
                f"and the model's context is {loaded.config.decoder.context}; use another model"
            )
        quantized_seconds = image_seconds
        kinds = [None, *(KINDS if can_quantize(loaded.config.decoder) else ())]
        with torch.device("meta"):
            tower = make_tower(loaded.config.vision)
        if kinds[1:] and place.type == "cpu" and quantized_shapes(tower):
            quantized_seconds = _measure_image(loaded, place, quantized=True)[2]
        # 2. The language model, with weights of each kind. Matrices that are stored in fewer bits stay so.
        if kept := kept_below(loaded.config, loaded.state, "int8"):
            notes = (*notes, kept)
        computed = {kind: "int4" if kept and kind else kind for kind in kinds}
        seconds = {
            bits: measure_decoder(loaded.config.decoder, bits, prompt_tokens, place, usual_dtype(place))
            for bits in dict.fromkeys(computed.values())
        }
        costs = []
        for kind in kinds:
            prefill, token = seconds[computed[kind]]
            first_word = (quantized_seconds if kind else image_seconds) + prefill
            costs.append(_cost(loaded, kind, place, free, prompt_tokens, first_word, token))
    return AskPlan(
        source, place.type, torch.get_num_threads(), kernel_name(), free,
        prompt_tokens, image_tokens, tuple(costs), notes,
    )  # fmt: skip


def busy_notes() -> tuple[str, ...]:
    """Return a note if other programs use the cores that are about to be timed."""
    load = busy_load()
    if load <= BUSY * usable_cores():
        return ()
    return (f"other programs use the cores (load {load:.1f}); without them all is faster than these times",)


def _cost(
    loaded: LoadedParts,
    quantize: str | None,
    device: torch.device,
    free: float | None,
    prompt_tokens: int,
    first_word: float,
    token: float,
) -> AskCost:
    """Return the costs with weights of one kind.

    first_word: seconds until then. token: seconds for each token after that.
    """
    config = loaded.config.decoder
    dtype = usual_dtype(device)
    # Weights, the cells that the prompt and the longest answer use, and the buffers of a step.
    cells = min(config.context, -(-(prompt_tokens + ANSWER) // BLOCK) * BLOCK)
    token_bytes = KVCache.bytes_per_token(config, cache_dtype(quantize, device, dtype))
    step_bytes = min(CHUNK_SHOWN, prompt_tokens) * (3 * config.mlp_width + 8 * config.width) * 4
    memory: dict[str, float] = dict(weight_sizes(loaded, quantize, device, dtype))
    memory["KV cache"] = cells * token_bytes
    memory["program and buffers"] = (PROCESS_BYTES if device.type == "cpu" else 0.0) + step_bytes
    fits = None if free is None else sum(memory.values()) <= free
    return AskCost(quantize or "none", memory, first_word, 1 / token, fits)


def measure_decoder(
    config: DecoderConfig, quantize: str | None, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Return the seconds that a prompt of T tokens takes, and those of each token of its answer."""
    # 1. As many layers as are timed together.
    weight_bytes = 1.0 if quantize == "int8" else 0.6 if quantize else float(dtype.itemsize)
    inner, shared = config.heads * config.head_dim, config.kv_heads * config.head_dim
    layer_weights = config.width * (2 * inner + 2 * shared + 3 * config.mlp_width)
    depth = min(config.depth, max(2, math.ceil(PROBE_BYTES / (layer_weights * weight_bytes))))
    times = time_answer(replace(config, depth=depth), quantize, tokens, device, dtype)
    if depth == config.depth:
        return times
    # 2. What comes once in each step does not grow with the depth: Python, sampling, the vocabulary. One
    #    layer shows it.
    single = time_answer(replace(config, depth=1), quantize, tokens, device, dtype)
    #    Other programs may have disturbed it, so that more layers seem to take less.
    prefill, token = (
        one + max(0.0, several - one) / (depth - 1) * (config.depth - 1)
        for one, several in zip(single, times, strict=True)
    )
    return prefill, token


def time_answer(
    config: DecoderConfig, quantize: str | None, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Return the seconds that an engine takes for a prompt of T tokens and for each token of its answer.

    All weights of its model are the same number.
    """
    model = _probe(config, quantize, device, dtype)
    engine = Engine(model, slots=1, cache_tokens=tokens + TIMED_TOKENS, chunk=CHUNK_SHOWN, prefix_cache=False)

    def answer(count: int, new: int) -> list[float]:
        times = [time.perf_counter()]
        prompt = Prompt(torch.ones(count, dtype=torch.long), params=SamplingParams(max_new_tokens=new))
        engine.submit(prompt, lambda delta: times.append(time.perf_counter()))
        while engine.step():
            pass
        return [end - start for start, end in itertools.pairwise(times)]

    # The first answer gets memory and threads ready. Of the others the fastest counts: other programs may
    # disturb some of them.
    answer(min(tokens, 16), 2)
    started = time.perf_counter()
    prefills: list[float] = []
    steps: list[float] = []
    while len(prefills) < ROUNDS and (not prefills or time.perf_counter() - started < PROBE_SECONDS):
        prefill, *others = answer(tokens, TIMED_TOKENS)
        prefills.append(prefill)
        steps.append(statistics.median(others))
    return min(prefills), min(steps)


def _probe(config: DecoderConfig, quantize: str | None, device: torch.device, dtype: torch.dtype) -> Llava:
    """Return a language model whose weights are all the same number."""
    # The embedding is only looked up, so that the vocabulary's matrix may stand for both.
    # The context may leave less room than the tokens that are timed.
    decoder_config = replace(config, tied_head=True, context=config.context + TIMED_TOKENS)
    vision = VisionConfig(kind="none", width=config.width)
    with torch.device("meta"):
        model = Llava(ModelConfig(decoder_config, vision, ConnectorConfig("identity")))
    if quantize is not None:
        swap(model.decoder, lambda name, weight: _constant(name, tuple(weight.shape), quantize), dtype)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                # Written, not only reserved: memory that was never written is not read from memory.
                values = torch.full(parameter.shape, 0.01, device=device, dtype=dtype)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
    return model.to(device).eval()


def _constant(name: str, shape: tuple[int, ...], quantize: str) -> PackedMatrix:
    kind = kind_of(quantize, name, shape[1])
    data = torch.ones(packed_size(kind, shape[0], shape[1]), dtype=torch.uint8)
    return PackedMatrix(kind, shape[0], shape[1], data)


def _measure_image(loaded: LoadedParts, device: torch.device, quantized: bool) -> tuple[int, int, float]:
    """Return the tokens of a prompt and of its picture, and the seconds for the picture's tokens."""
    processor = Processor(loaded.config, Tokenizer(loaded.tokenizer))
    images = [] if loaded.config.vision.kind == "none" else [Image.new("RGB", (640, 480), (120, 90, 60))]
    sample = processor.prompt(Conversation((user_message(QUESTION, images),)))
    if not images:
        return len(sample.input_ids), 0, 0.0
    pixels = torch.from_numpy(processor.pixels(sample.images, sample.layouts)).to(device)
    seconds = _seconds(processor.pixels, sample.images, sample.layouts, device=device)
    # A ViT is timed with no block and with two, all others whole.
    vision = loaded.config.vision
    running = vision.layer % (vision.depth + 1) if vision.depth else 0
    encoders = [
        _encoder(loaded, blocks, device, quantized) for blocks in ((0, 2) if running > 2 else (running,))
    ]
    for encoder in encoders:
        encoder.encode(pixels, sample.layouts)
    times = [_seconds(encoder.encode, pixels, sample.layouts, device=device) for encoder in encoders]
    seconds += times[0] + (times[-1] - times[0]) / 2 * running
    return len(sample.input_ids), sum(layout.tokens for layout in sample.layouts), seconds


def _encoder(loaded: LoadedParts, blocks: int, device: torch.device, quantized: bool) -> Llava:
    """Return a random model with so many blocks of a ViT, and no more of a decoder than it must have."""
    config: ModelConfig = loaded.config
    vision = config.vision
    if vision.depth:
        vision = replace(vision, depth=blocks, layer=blocks)
    decoder = replace(config.decoder, depth=1, vocab_size=64, mlp_width=32)
    model = Llava(replace(config, vision=vision, decoder=decoder, lora=None))
    stored = {tensor.dtype for name, tensor in loaded.state.items() if name.startswith("tower.blocks.")}
    dtype = usual_dtype(device)
    model = model.to(device, dtype).requires_grad_(False).eval()
    for module in model.modules():
        if isinstance(module, WideningLinear) and stored & {torch.float16, torch.bfloat16}:
            module.weight.data = module.weight.data.half()
    if quantized:
        quantize_vision(model.tower, model.tower.get_parameter)
    return model


def _seconds(function: Callable[..., object], *arguments: object, device: torch.device) -> float:
    """Return the time of the fastest of some calls."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        result = function(*arguments)
        if device.type != "cpu" and isinstance(result, Tensor):
            result.flatten()[0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times)
