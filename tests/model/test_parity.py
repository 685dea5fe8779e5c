"""Whole models against transformers: small random ones of each generation, logits in fp32."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pumice.config import IMAGE_TOKEN, DecoderConfig, ImagePolicy, ModelConfig, VisionConfig
from pumice.engine.generate import generate, naive_generate
from pumice.engine.requests import Prompt
from pumice.engine.sampling import SamplingParams
from pumice.formats.names import clip_tower, convert, hf_decoder, siglip_tower
from pumice.geometry import Layout, single_tile_layout, tile_layout
from pumice.images import to_tiles
from pumice.model.cache import KVCache, Segment
from pumice.model.layers import Causal
from pumice.model.llava import Llava

IMAGE_ID = 98  # transformers' placeholder
# Measured worst case: 0 of whole sequences, 7.6e-6 of padded ones and with the cache, where the kernels
# differ; of logits with a standard deviation above 1.
CLOSE = 4e-5

DECODER = DecoderConfig(
    vocab_size=99, width=32, depth=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48, context=2048
)
CLIP = VisionConfig("clip", image_size=16, stride=4, width=24, depth=3, heads=3, mlp_width=40)
SIGLIP = dataclasses.replace(
    CLIP, kind="siglip", image_size=18, select="full", layer=-1, activation="gelu_tanh", norm_eps=1e-6
)
QWEN2 = dataclasses.replace(DECODER, qkv_bias=True)


def tiles(side: int, max_tiles: int) -> ImagePolicy:
    sizes = [
        (side * w, side * h) for w in range(1, max_tiles + 1) for h in range(1, max_tiles + 1) if w * h > 1
    ]
    return ImagePolicy("anyres", pinpoints=tuple(sizes))


# name -> (transformers' kind, its text model, our config)
MODELS: dict[str, tuple[str, str, ModelConfig]] = {
    "llava, clip": ("Llava", "llama", ModelConfig(DECODER, CLIP)),
    "llava, class token": (
        "Llava", "mistral", ModelConfig(DECODER, dataclasses.replace(CLIP, select="cls_patch", layer=-1))
    ),
    "llava, siglip": ("Llava", "qwen2", ModelConfig(QWEN2, dataclasses.replace(SIGLIP, layer=-2))),
    "next": ("LlavaNext", "llama", ModelConfig(DECODER, CLIP, image=tiles(16, 3))),
    "onevision": (
        "LlavaOnevision", "qwen2",
        ModelConfig(QWEN2, SIGLIP, image=dataclasses.replace(tiles(18, 4), max_tiles=9)),
    ),
}  # fmt: skip
SHAPES = [(50, 40), (16, 16), (9, 60), (70, 15), (100, 99)]  # width, height


@dataclass
class Pair:
    hf_model: Any
    model: Llava
    config: ModelConfig

    def layouts(self, sizes: list[tuple[int, int]]) -> list[Layout]:
        if self.config.image.mode != "anyres":
            return [single_tile_layout(self.config)] * len(sizes)
        return [tile_layout(self.config, size) for size in sizes]

    def pixels(self, sizes: list[tuple[int, int]]) -> Tensor:
        side = self.config.vision.image_size
        tile_pixels = [to_tiles(picture(size), side, self.config.image) for size in sizes]
        return torch.from_numpy(np.concatenate(tile_pixels))

    def hf_logits(self, ids: Tensor, sizes: list[tuple[int, int]], **more: Any) -> Tensor:
        return self.hf_model(**self.hf_inputs(ids, sizes), **more).logits

    def hf_inputs(self, ids: Tensor, sizes: list[tuple[int, int]]) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": ids.masked_fill(ids == IMAGE_TOKEN, IMAGE_ID)}
        if sizes:
            inputs["pixel_values"] = self.pixels(sizes)
            if self.config.image.mode == "anyres":
                inputs["image_sizes"] = torch.tensor([(height, width) for width, height in sizes])
        return inputs

    def image_tokens(self, sizes: list[tuple[int, int]]) -> Tensor | None:
        return self.model.encode(self.pixels(sizes), self.layouts(sizes)) if sizes else None

    def ids(self, sizes: list[tuple[int, int]], seed: int = 0) -> list[int]:
        """Text with the pictures among it."""
        random = np.random.default_rng(seed)
        ids: list[int] = random.integers(0, IMAGE_ID, 4).tolist()
        for layout in self.layouts(sizes):
            ids += [IMAGE_TOKEN] * layout.tokens + random.integers(0, IMAGE_ID, 3).tolist()
        return ids


def picture(size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise)


def make(name: str) -> Pair:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    kind, text, config = MODELS[name]
    vision, decoder = config.vision, config.decoder
    activations = {"quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    options: dict[str, Any] = {
        "vision_config": {
            "model_type": f"{vision.kind}_vision_model", "hidden_size": vision.width,
            "intermediate_size": vision.mlp_width, "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads, "image_size": vision.image_size,
            "patch_size": vision.stride, "hidden_act": activations[vision.activation],
            "layer_norm_eps": vision.norm_eps,
        },
        "text_config": {
            "model_type": text, "vocab_size": decoder.vocab_size, "hidden_size": decoder.width,
            "intermediate_size": decoder.mlp_width, "num_hidden_layers": decoder.depth,
            "num_attention_heads": decoder.heads, "num_key_value_heads": decoder.kv_heads,
            "head_dim": decoder.head_dim, "max_position_embeddings": decoder.context,
            "rms_norm_eps": decoder.norm_eps, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_window": None, "tie_word_embeddings": False, "eos_token_id": None, "pad_token_id": 0,
        },
        "image_token_index": IMAGE_ID, "vision_feature_layer": vision.layer,
        "vision_feature_select_strategy": "default" if vision.select == "patch" else "full",
    }  # fmt: skip
    if config.image.mode == "anyres":
        options["image_grid_pinpoints"] = [[height, width] for width, height in config.image.pinpoints]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf_config = getattr(transformers, f"{kind}Config")(**options)
        hf_model = getattr(transformers, f"{kind}ForConditionalGeneration")(hf_config).eval()
        for parameter in hf_model.parameters():  # fresh biases are zero, fresh norms one: nothing would show
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    our_model = Llava(config).eval()
    our_model.load_state_dict(renamed(hf_model.state_dict(), config))
    return Pair(hf_model, our_model, config)


def renamed(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    parts: dict[str, dict[str, Tensor]] = {"tower": {}, "decoder": {}}
    named = {}
    for name, tensor in state.items():
        short = name.removeprefix("model.")
        if short.startswith("vision_tower."):
            short = short.removeprefix("vision_tower.").removeprefix("vision_model.")
            parts["tower"][short] = tensor
        elif short.startswith("multi_modal_projector."):
            _, layer, part = short.split(".")
            named[f"connector.layers.{0 if layer == 'linear_1' else 2}.{part}"] = tensor
        elif short == "image_newline":
            named[short] = tensor
        else:
            parts["decoder"][short.replace("language_model.", "model.")] = tensor
    towers = {"clip": clip_tower, "siglip": siglip_tower}
    tower = convert(parts["tower"], towers[config.vision.kind](config.vision))
    decoder = convert(parts["decoder"], hf_decoder(config.decoder))
    named |= {f"tower.{name}": tensor for name, tensor in tower.items()}
    return named | {f"decoder.{name}": tensor for name, tensor in decoder.items()}


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return make(request.param)


@pytest.mark.parametrize("pictures", [0, 1, len(SHAPES)])
@torch.no_grad()
def test_logits_equal(pair: Pair, pictures: int) -> None:
    sizes = SHAPES[:pictures]
    ids = torch.tensor([pair.ids(sizes)])
    actual = pair.model.decoder.logits(pair.model(ids, pair.image_tokens(sizes)))
    reference = pair.hf_logits(ids, sizes)
    assert reference.std() > 1
    assert (actual - reference).abs().max() < CLOSE


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_of_a_padded_batch_equal(pair: Pair, side: str) -> None:
    rows = [SHAPES[:2], [], SHAPES[2:3], SHAPES[3:]]
    written = [pair.ids(sizes, seed) for seed, sizes in enumerate(rows)]
    longest = max(map(len, written))
    ids, real = torch.zeros(4, longest, dtype=torch.long), torch.zeros(4, longest, dtype=torch.bool)
    for number, row in enumerate(written):
        token_slice = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[number, token_slice], real[number, token_slice] = torch.tensor(row), True
    positions = (real.cumsum(1) - 1).clamp_min(0)
    sizes = [size for row in rows for size in row]
    reference = pair.hf_logits(ids, sizes, attention_mask=real.long(), position_ids=positions)
    hidden = pair.model(ids, pair.image_tokens(sizes), positions, Causal(pair.model.config.decoder, real))
    actual = pair.model.decoder.logits(hidden)
    assert (actual - reference)[real].abs().max() < CLOSE
    for number, row in enumerate(rows):  # and a row alone has the logits that it has in the batch
        alone = pair.model(ids[number][real[number]][None], pair.image_tokens(row))
        assert (pair.model.decoder.logits(alone)[0] - actual[number][real[number]]).abs().max() < CLOSE


@torch.no_grad()
def test_logits_with_a_cache_equal(pair: Pair) -> None:
    sizes = SHAPES[:2]
    ids = torch.tensor([[*pair.ids(sizes), 7, 8, 9]])
    reference = pair.hf_logits(ids, sizes)[0, -4:]
    cache = KVCache(pair.config.decoder, ids.shape[1], torch.device("cpu"), torch.float32)
    length = ids.shape[1] - 3
    table = list(range(cache.blocks))
    segments = [Segment(table, 0, length)]
    prompt = ids[:, :length], pair.image_tokens(sizes)
    steps = [pair.model(*prompt, cache.positions(segments), cache.attend(segments))[:, -1]]
    for past, token in enumerate(ids[0, length:], length):
        one = [Segment(table, past, 1)]
        steps.append(pair.model(token.view(1, 1), None, cache.positions(one), cache.attend(one))[:, -1])
    assert (pair.model.decoder.logits(torch.cat(steps)) - reference).abs().max() < CLOSE


@torch.no_grad()
def test_greedy_answers_equal(pair: Pair) -> None:
    sizes = SHAPES[2:4]
    ids = pair.ids(sizes, seed=1)
    inputs = pair.hf_inputs(torch.tensor([ids]), sizes)
    reference = pair.hf_model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    prompt = Prompt(torch.tensor(ids), pair.image_tokens(sizes), SamplingParams(max_new_tokens=8))
    assert len(set(reference)) > 2
    assert naive_generate(pair.model, prompt) == reference
    assert [token for _, token in generate(pair.model, [prompt]) if token is not None] == reference


@pytest.mark.parametrize(
    ("beams", "penalty", "stops", "longest"),
    [(2, 1.0, 1, 12), (3, 0.0, 3, 12), (3, 2.5, 3, 12), (4, -1.0, 2, 9), (5, 1.0, 0, 7), (3, 0.7, 2, 1)],
)
@torch.no_grad()
def test_answers_of_beam_search_equal(beams: int, penalty: float, stops: int, longest: int) -> None:
    pair = make("llava, clip")
    for seed in range(8):
        sizes = SHAPES[seed % 3 : seed % 3 + 1]
        ids = pair.ids(sizes, seed=seed)
        inputs = pair.hf_inputs(torch.tensor([ids]), sizes)
        # Likely tokens end answers, so that answers of several lengths compete.
        likely = pair.hf_logits(torch.tensor([ids]), sizes)[0, -1].topk(20).indices.tolist()
        ends = likely[3 : 3 + stops]
        reference = pair.hf_model.generate(
            **inputs, max_new_tokens=longest, do_sample=False, num_beams=beams, length_penalty=penalty,
            early_stopping=False, eos_token_id=ends or None, pad_token_id=0,
        )[0, len(ids) :].tolist()  # fmt: skip
        end = next((place for place, token in enumerate(reference) if token in ends), None)
        expected = reference[:end]
        model = Llava(dataclasses.replace(pair.config, stop_token_ids=tuple(ends))).eval()
        model.load_state_dict(pair.model.state_dict())
        params = SamplingParams(max_new_tokens=longest, num_beams=beams, length_penalty=penalty)
        prompt = Prompt(torch.tensor(ids), pair.image_tokens(sizes), params)
        for slots in (1, 8):
            answer = [token for _, token in generate(model, [prompt], slots=slots) if token is not None]
            assert answer == expected


def letters(tokens: Sequence[int]) -> str:
    return "".join(chr(ord("a") + token % 26) for token in tokens)


@pytest.mark.parametrize(
    ("beams", "length_penalty", "seeds", "stops_of"),
    [
        (
            3,
            0.5,
            range(8),
            lambda likely: (letters(likely[4:5]), letters(likely[5:7]), letters(likely[9:10])),
        ),
        # So many that all of the likeliest continuations may stop.
        (2, 1.0, range(8, 14), lambda likely: tuple(dict.fromkeys(letters(likely[4:])))[:8]),
    ],
)
@torch.no_grad()
def test_a_stop_text_ends_a_beam_as_in_transformers(
    beams: int, length_penalty: float, seeds: range, stops_of: Callable[[list[int]], tuple[str, ...]]
) -> None:
    """As by its `stop_strings`, but without a tokenizer: each token is one letter."""
    pair = make("llava, clip")
    criteria = pytest.importorskip("transformers").StoppingCriteriaList
    lengths = set()
    for seed in seeds:
        sizes = SHAPES[seed % 3 : seed % 3 + 1]
        ids = pair.ids(sizes, seed=seed)
        stops = stops_of(pair.hf_logits(torch.tensor([ids]), sizes)[0, -1].topk(60).indices.tolist())

        def ended(input_ids: Tensor, scores: object, start: int = len(ids), ends: Any = stops) -> Tensor:
            return torch.tensor([letters(answer).endswith(ends) for answer in input_ids[:, start:].tolist()])

        reference = pair.hf_model.generate(
            **pair.hf_inputs(torch.tensor([ids]), sizes), attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=12, do_sample=False, num_beams=beams, length_penalty=length_penalty,
            eos_token_id=None, pad_token_id=0, stopping_criteria=criteria([ended]),
        )[0, len(ids) :].tolist()  # fmt: skip
        options: dict[str, Any] = {"num_beams": beams, "length_penalty": length_penalty}
        params = SamplingParams(max_new_tokens=12, **options, stop=stops)
        prompt = Prompt(torch.tensor(ids), pair.image_tokens(sizes), params, decode=letters)
        model = Llava(dataclasses.replace(pair.config, stop_token_ids=())).eval()
        model.load_state_dict(pair.model.state_dict())
        assert [token for _, token in generate(model, [prompt]) if token is not None] == reference
        lengths.add(len(reference))
    assert len(lengths) > 1 and min(lengths) < 12


def test_onevision_shrinks_a_large_map() -> None:
    config = MODELS["onevision"][2]
    layout = tile_layout(config, (100, 99))
    assert (layout.columns, layout.rows) == (4, 4)
    assert (layout.height, layout.width) == (12, 12)
