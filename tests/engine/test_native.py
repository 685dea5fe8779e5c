"""Compiled decoding against the modules: the same numbers, whatever the company."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pumice.config import ConnectorConfig, DecoderConfig, ModelConfig, RopeScaling, VisionConfig
from pumice.engine import native
from pumice.engine.generate import generate
from pumice.engine.native import NativeDecoder, native_decoder
from pumice.engine.requests import Prompt
from pumice.engine.sampling import SamplingParams
from pumice.kernels.compute import quantize as quantize_weight
from pumice.kernels.packed import PackedMatrix
from pumice.model.cache import KVCache, Segment
from pumice.model.decoder import Decoder
from pumice.model.llava import Llava
from pumice.model.quantized import KINDS, kind_of, quantize, swap

CPU, PAST = torch.device("cpu"), (5, 1, 9, 0, 7, 3, 8)
FAMILIES = pytest.mark.parametrize(
    "more",
    [
        {},
        {"qkv_bias": True},
        {"qk_norm": True},
        {"tied_head": True},
        {"sliding_window": 4},
        {"rope_scaling": RopeScaling("linear", 2.0)},
        {"heads": 6, "kv_heads": 2},
        {"head_dim": 48, "kv_heads": 1, "heads": 2},  # heads of several vectors, whole groups of 32 of both
        {"width": 256, "mlp_width": 512},  # rows that int4 holds as Q4_K
    ],
    ids=lambda more: next(iter(more), "llama"),
)


@pytest.fixture(autouse=True)
def compiler() -> None:
    code, reason = native.compiled("packed")
    if code is None:
        pytest.skip(reason)


# mixed: layers that read the same activations hold their weights in int8 and int4, as in llama.cpp's Q4_K_M
WEIGHTS = pytest.mark.parametrize("weights", ["int8", "int4", "mixed", "fp32"])


def make(weights: str = "int8", **more: Any) -> Decoder:
    width = 256 if weights == "mixed" else 64  # from 256 on, int4 is Q4_K, whose activations share scales
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 16, "width": width, "mlp_width": 160} | more
    config = DecoderConfig(vocab_size=52, depth=3, **sizes)
    torch.manual_seed(0)
    decoder = Decoder(config).eval().requires_grad_(False)
    for parameter in decoder.parameters():
        parameter.data.normal_(0, 0.15) if parameter.dim() == 2 else parameter.data.uniform_(0.5, 1.5)
    if weights == "mixed":
        swap(decoder, mixed)
    elif weights in KINDS:
        quantize(decoder, weights)
    return decoder


def mixed(name: str, weight: Tensor) -> PackedMatrix:
    bits = "int8" if name.endswith((".v.weight", ".up.weight")) else "int4"
    return quantize_weight(weight, kind_of(bits, name, weight.shape[1]), name)


def filled(decoder: Decoder) -> tuple[KVCache, list[Segment]]:
    """A cache in which seven sequences have had some tokens, in blocks that lie anywhere."""
    cache = KVCache(decoder.config, 12 * len(PAST), CPU, decoder.cache_dtype, block=4)
    generator = torch.Generator().manual_seed(1)
    cache.keys.copy_(torch.randn(cache.keys.shape, generator=generator))
    cache.values.copy_(torch.randn(cache.values.shape, generator=generator))
    # Some tables are neighbours, which PyTorch reads in place, some are not; two sequences share a block.
    tables = [[3 * n, 3 * n + (1 if n % 2 else 2), 3 * n + (2 if n % 2 else 1)] for n in range(len(PAST))]
    tables[6][0] = tables[2][0]
    return cache, [Segment(tables[n], past, 1) for n, past in enumerate(PAST)]


def ready(decoder: Decoder, cache: KVCache) -> NativeDecoder:
    native_result = native_decoder(decoder, cache)
    assert native_result is not None
    return native_result


@WEIGHTS
@FAMILIES
@torch.inference_mode()
def test_equals_the_modules_in_fp32(more: dict[str, Any], weights: str) -> None:
    decoder = make(weights, **more)
    cache, segments = filled(decoder)
    # prompts among answers
    segments = [segment._replace(new=1 + n % 3) for n, segment in enumerate(segments)]
    same, _ = filled(decoder)
    x = decoder.embed(torch.arange(sum(segment.new for segment in segments)) * 3)
    due = [0, 2, 5, 12]
    actual = ready(decoder, cache).logits(x, segments, due)
    # Weights in fp32 are compared with float64: PyTorch's own fp32 is off by up to 2.9e-6 on some processors.
    modules, dtype = (
        (decoder.double(), torch.float64) if weights == "fp32" else (decoder, decoder.cache_dtype)
    )
    wide = KVCache(decoder.config, cache.capacity, CPU, dtype, cache.block)
    wide.keys.copy_(same.keys)
    wide.values.copy_(same.values)
    x = x.to(torch.float64) if weights == "fp32" else x
    hidden = modules(x[None], wide.positions(segments), wide.attend(segments))[0]
    expected = modules.logits(hidden[due])
    errors = (actual - expected).abs().amax(-1) / expected.abs().max()
    print(f"{weights} {more}: {errors.max():.1e}")
    # measured worst: 8e-7 in fp32, 3e-7 else; keys and values in bfloat16 may round to the next number
    tolerance, cache_tolerance = (2e-6, 2e-6) if weights == "fp32" else (1e-5, 6e-3)
    # An activation between two numbers of 8 bits may round to the other, once in some 100 rows. Its row is
    # then off by 2 %, and so may be what follows in its sequence, but nothing in another one.
    owners = [n for n, segment in enumerate(segments) for _ in range(segment.new)]
    off = {owners[token] for token, error in zip(due, errors, strict=True) if error >= tolerance}
    cells = [
        table[place // cache.block] * cache.block + place % cache.block
        for table, past, new in segments
        for place in range(past, past + new)
    ]
    for actual_cache, expected_cache in ((cache.keys, wide.keys), (cache.values, wide.values)):
        differences = (actual_cache.float() - expected_cache).abs().amax((0, 1, 3))
        differences /= expected_cache.abs().max()
        off |= {owners[n] for n, cell in enumerate(cells) if differences[cell] >= cache_tolerance}
        assert differences.max() < 0.05
    assert errors.max() < 0.05
    assert len(off) <= (0 if weights == "fp32" else 1)


@WEIGHTS
@torch.inference_mode()
def test_a_row_is_the_same_in_any_company_and_with_any_threads(weights: str) -> None:
    decoder = make(weights)
    x = decoder.embed(torch.arange(len(PAST)) * 3)
    cache, segments = filled(decoder)
    together = ready(decoder, cache).logits(x, segments, range(len(PAST)))

    def some(first: int, last: int) -> Tensor:
        fresh, _ = filled(decoder)
        return ready(decoder, fresh).logits(x[first:last], segments[first:last], range(last - first))

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for first, last in [(n, n + 1) for n in range(len(PAST))] + [(0, n) for n in range(2, len(PAST))]:
            assert torch.equal(some(first, last), together[first:last])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("weights", ["int8", "mixed"])
@pytest.mark.parametrize("window", [None, 48])
@torch.inference_mode()
def test_a_prompt_equals_the_modules_and_does_not_depend_on_company(window: int | None, weights: str) -> None:
    """Prompts, with and without an earlier part, beside an answer."""
    decoder = make(weights, sliding_window=window)
    segments = [
        Segment([0, 9, 5, 7], 0, 100), Segment([1], 20, 1), Segment([2, 8, 4], 33, 40), Segment([3], 0, 2),
    ]  # fmt: skip
    x = decoder.embed(torch.arange(sum(segment.new for segment in segments)) % 52)
    ends = list(itertools.accumulate(segment.new for segment in segments))

    def fresh() -> KVCache:
        cache = KVCache(decoder.config, 10 * 32, CPU, torch.bfloat16, block=32)
        generator = torch.Generator().manual_seed(1)
        cache.keys.copy_(torch.randn(cache.keys.shape, generator=generator))
        cache.values.copy_(torch.randn(cache.values.shape, generator=generator))
        return cache

    cache, wide = fresh(), fresh()
    due = [40, *(end - 1 for end in ends)]
    together = ready(decoder, cache).logits(x, segments, due)
    expected = decoder.logits(
        decoder(x[None], wide.positions(segments), wide.attend(segments), rows=torch.tensor(due))[0]
    )
    worst = ((together - expected).abs().amax(-1) / expected.abs().max()).sort().values
    print(f"window {window}: {worst}")
    assert worst[:3].max() < 1e-5 and worst[-1] < 0.05  # rounded activations and keys: see above

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for number, segment in enumerate(segments):
            alone = ready(decoder, fresh())
            rows = x[ends[number] - segment.new : ends[number]]
            assert torch.equal(alone.logits(rows, [segment], [segment.new - 1])[0], together[1 + number])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("weights", ["int8", "int4", "mixed"])
@pytest.mark.parametrize("window", [None, 48])
@torch.inference_mode()
def test_a_prompt_is_the_same_in_any_chunks(window: int | None, weights: str) -> None:
    """As where parts of it are cached: all but the last token, if it is asked for again."""
    decoder = make(weights, sliding_window=window)
    x = decoder.embed(torch.arange(150) * 7 % 52)

    def logits(*ends: int) -> Tensor:
        native = ready(decoder, KVCache(decoder.config, 160, CPU, torch.bfloat16, block=32))
        for past, end in itertools.pairwise((0, *ends)):
            segment = Segment(range(5), past, end - past)
            result = native.logits(x[past:end], [segment], [segment.new - 1] if end == len(x) else [])
        return result

    whole = logits(150)
    for ends in (149, 150), (1, 2, 150), (33, 34, 35, 150), (64, 128, 148, 150), range(1, 151):
        assert torch.equal(logits(*ends), whole)


@torch.inference_mode()
def test_activations_are_not_rounded_anew_while_a_thread_multiplies_them() -> None:
    decoder = make("mixed", heads=16, kv_heads=16)
    segment = Segment(range(5), 0, 143)
    x = decoder.embed(torch.arange(segment.new) % 52)

    def logits(thread_count: int) -> Tensor:
        torch.set_num_threads(thread_count)
        cache = KVCache(decoder.config, 5 * 32, CPU, torch.bfloat16, block=32)
        return ready(decoder, cache).logits(x, [segment], [segment.new - 1])

    threads = torch.get_num_threads()
    try:
        alone = logits(1)
        assert all(torch.equal(logits(count), alone) for _ in range(30) for count in (2, 3))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("new", [1, 3], ids=["an answer", "a prompt"])
@WEIGHTS
@torch.inference_mode()
def test_keys_that_are_not_finite_are_not_passed_over(weights: str, new: int) -> None:
    """A softmax that took NaN for a small number would answer from the values alone, as if all was well."""
    decoder = make(weights)
    cache, segments = filled(decoder)
    segment = segments[2]._replace(new=new)
    x = decoder.embed(torch.arange(new))
    native_code = ready(decoder, cache)
    assert native_code.logits(x, [segment], [0]).isfinite().all()
    cache.keys[1, 0, segment.table[0] * cache.block] = torch.nan
    assert native_code.logits(x, [segment], [0]).isnan().all()


@WEIGHTS
@torch.inference_mode()
def test_only_finite_numbers_prove_that_it_agrees(weights: str) -> None:
    decoder = make(weights)
    native_code, x = ready(decoder, filled(decoder)[0]), decoder.embed(torch.arange(4))
    assert native_code.agrees(torch.full_like(x, torch.nan))  # a broken picture says nothing about the code
    assert not native_code.compared
    assert native_code.agrees(x) and native_code.compared


def test_a_token_without_a_place_is_refused() -> None:
    decoder = make()
    cache, _ = filled(decoder)
    with pytest.raises(ValueError, match="do not fit"):
        ready(decoder, cache).logits(decoder.embed(torch.tensor([1])), [Segment([0, 1], 8, 1)], [0])
    with pytest.raises(ValueError, match=r"\[0, 21\] are not all in a cache of 21 blocks"):
        ready(decoder, cache).logits(decoder.embed(torch.tensor([1])), [Segment([0, 21], 4, 1)], [0])
    with pytest.raises(ValueError, match="expected 64 values for each new token"):
        ready(decoder, cache).logits(decoder.embed(torch.tensor([1])), [Segment([0], 0, 2)], [0])


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("heads", [2, 4, 6, 10, 12, 14])
@torch.inference_mode()
def test_long_sequences_equal_the_modules(heads: int, window: int | None) -> None:
    """Several pieces per sequence, groups of 1 to 7 heads, blocks in any order."""
    decoder = make("fp32", heads=heads, kv_heads=2, sliding_window=window)
    past = (700, 255, 256, 3)
    cache = KVCache(decoder.config, 4 * 704, CPU, torch.float32, block=16)
    cache.keys.normal_(0, 1.5)
    cache.values.normal_()
    order = torch.randperm(cache.blocks).tolist()
    # Tables are no longer than their sequences need, so that nothing can be read behind the shorter ones.
    segments = [Segment(order[44 * n : 44 * n + count // 16 + 1], count, 1) for n, count in enumerate(past)]
    x = decoder.embed(torch.arange(len(past)) * 3)
    found = ready(decoder, cache).logits(x, segments, range(len(past)))
    hidden = decoder(x[None], cache.positions(segments), cache.attend(segments))[0]
    expected = decoder.logits(hidden)
    worst = ((found - expected).abs().max() / expected.abs().max()).item()
    print(f"{heads} heads, window {window}: {worst:.1e}")
    assert worst < 5e-6


def llava(weights: str) -> Llava:
    decoder = make(weights)
    config = ModelConfig(
        decoder=decoder.config,
        vision=VisionConfig(image_size=64, variant="lite0"),
        connector=ConnectorConfig(kind="linear"),
    )
    model = Llava(config).eval()
    model.decoder = decoder
    return model


@WEIGHTS
def test_the_engine_answers_alike_with_and_without(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llava(weights)
    kind = "fp32" if weights == "fp32" else "packed"
    monkeypatch.setitem(native.MAX_PROMPT_ROWS, kind, 8)  # so that PyTorch computes the longest prompt
    texts = [range(2, 2 + n) for n in (3, 9, 5)] + [range(20, 27)]
    prompts = [Prompt(torch.tensor(text), params=SamplingParams(max_new_tokens=12)) for text in texts]
    used: list[list[int]] = []
    plain = NativeDecoder.logits

    def noted(self: NativeDecoder, x: Tensor, segments: list[Segment], due: list[int]) -> Tensor:
        used.append([segment.new for segment in segments])
        return plain(self, x, segments, due)

    monkeypatch.setattr(NativeDecoder, "logits", noted)
    fast = list(generate(model, prompts, slots=3))
    assert [1, 1, 1] in used and [7] in used and not any(9 in news for news in used)
    monkeypatch.setattr(native, "compiled", lambda weights: (None, "it is off"))
    used.clear()
    slow = list(generate(model, prompts, slots=3))
    assert not used

    def first(events: list[tuple[int, int | None]]) -> list[list[int | None]]:
        return [[token for number, token in events if number == n] for n in range(4)]

    assert first(fast) == first(slow)


@pytest.mark.parametrize("width", [64, 72])
def test_serves_only_what_it_can_compute(width: int) -> None:
    config = DecoderConfig(
        vocab_size=52, width=width, depth=1, heads=4, kv_heads=2, head_dim=16, mlp_width=160
    )
    decoder, wide = Decoder(config), KVCache(config, 8, CPU, torch.float32)
    assert (native_decoder(decoder, wide) is not None) == (width == 64)
    decoder = decoder.to(torch.bfloat16)
    cache = KVCache(config, 8, CPU, torch.bfloat16)
    assert native_decoder(decoder, cache) is None  # bfloat16, not quantised
    if width == 72:
        return
    quantize(decoder, "int8")
    assert native_decoder(decoder, cache) is not None
    assert native_decoder(decoder, wide) is None
    decoder.norm.bfloat16()
    assert native_decoder(decoder, cache) is None
