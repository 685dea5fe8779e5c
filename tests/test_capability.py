"""Every field of every config is implemented by a consumer, and refused by name by all that do not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import pumice
from pumice import boxes, processor
from pumice.capability import Capability, fields
from pumice.config import (
    ChatFormat,
    ConnectorConfig,
    DecoderConfig,
    GenerationConfig,
    ImagePolicy,
    LoraConfig,
    ModelConfig,
    RopeScaling,
    VisionConfig,
)
from pumice.engine import native
from pumice.engine.generate import generate, naive_generate
from pumice.engine.requests import Prompt
from pumice.engine.sampling import SamplingParams
from pumice.errors import InputError
from pumice.explain import attention, maps
from pumice.explain.attention import Passage, Passages, read
from pumice.formats.export import REFUSALS, export
from pumice.formats.gguf import write as gguf_write
from pumice.formats.hf import idefics3
from pumice.formats.hf import refusal as hf_refusal
from pumice.formats.hf import write as hf_write
from pumice.formats.llava import write as llava_write
from pumice.formats.read import read_model
from pumice.formats.text.chat_template_write import to_jinja
from pumice.geometry import single_tile_layout
from pumice.kernels import compute
from pumice.media import TileMarks, VideoPolicy
from pumice.model import adapters, cache, connector, decoder, packed
from pumice.model.cache import KVCache
from pumice.model.llava import TOWERS, Llava
from pumice.model.packed import PackedAttention, Run
from pumice.model.quantized import KINDS, PackedEmbedding, PackedLinear, quantize
from pumice.processor import Processor
from pumice.templates import get_template
from pumice.tokens import Tokenizer
from pumice.train import objective
from pumice.train.objective import Objective, PackTensors

CPU = torch.device("cpu")
CLASSES = (
    DecoderConfig, RopeScaling, VisionConfig, ConnectorConfig, ImagePolicy, GenerationConfig, LoraConfig,
    ChatFormat, TileMarks, VideoPolicy, ModelConfig,
)  # fmt: skip
# What computes an answer: it lists every field. The others may refuse some.
COMPUTING: dict[str, Capability] = {
    "decoder": decoder.CAPABILITY,
    "connector": connector.CAPABILITY,
    "adapters": adapters.CAPABILITY,
    "processor": processor.CAPABILITY,
    **{
        f"tower {kind}": Capability(kind, {VisionConfig: fields(implemented)})
        for kind, (implemented, _) in TOWERS.items()
    },
}
CONSUMERS: dict[str, Capability] = COMPUTING | {
    "maps": maps.CAPABILITY,
    "explanations": attention.CAPABILITY,
    "packs": packed.CAPABILITY,
    "cache": cache.CAPABILITY,
    "loss": objective.CAPABILITY,
    "boxes": boxes.CAPABILITY,
    "native": native.CAPABILITY,
    "hf": hf_refusal.CAPABILITY,
    "idefics3": idefics3.CAPABILITY,
    "llava": llava_write.CAPABILITY,
    "gguf": gguf_write.CAPABILITY,
}


@pytest.mark.parametrize("config_class", CLASSES)
def test_every_field_is_listed_somewhere(config_class: type) -> None:
    """A field that is added, and listed nowhere, would be ignored everywhere."""
    # How answers are drawn belongs to the engine, and a model as a whole to its parts.
    consumers = CONSUMERS if config_class in (GenerationConfig, ModelConfig) else COMPUTING
    listed = {name for consumer in consumers.values() for name in consumer.fields.get(config_class, ())}
    assert {field.name for field in dataclasses.fields(config_class)} == listed


def test_sampling_has_every_field_of_generation() -> None:
    values = dataclasses.asdict(GenerationConfig(0.5, 0.9, 3, 1.1))
    assert values.items() <= dataclasses.asdict(SamplingParams.of(values)).items()


def test_every_consumer_of_pictures_and_adapters_refuses_a_field_that_it_does_not_list(
    models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a version that has one field more, which nobody listed."""
    source = models.tiny(models.ARCHITECTURES["CLIP + Llama, LoRA"])
    image = replace(source.config.image, resample="bilinear")
    lora = replace(source.config.lora, dropout=0.5)
    decoder_config = replace(source.config.decoder, norm_eps=1e-3)
    config = replace(source.config, image=image, lora=lora, decoder=decoder_config)
    built = Llava(config)
    layout = single_tile_layout(config)
    consumers: tuple[tuple[Any, type, str, Callable[[], object]], ...] = (
        (processor, ImagePolicy, "resample", lambda: Processor(config, Tokenizer(source.tokenizer))),
        (maps, ImagePolicy, "resample", lambda: maps.token_boxes(config, (60, 40), layout)),
        (boxes, ImagePolicy, "resample", lambda: boxes.box_map(config, (60, 40))),
        (adapters, LoraConfig, "dropout", lambda: Llava(config)),
        (decoder, DecoderConfig, "norm_eps", lambda: Llava(config)),
        (cache, DecoderConfig, "norm_eps", lambda: KVCache(config.decoder, 64, CPU, torch.float32)),
        (packed, DecoderConfig, "norm_eps", lambda: PackedAttention([], config.decoder)),
        (attention, DecoderConfig, "norm_eps", lambda: Passages([], config.decoder, None)),
        (objective, DecoderConfig, "norm_eps", lambda: Objective(built, None, bf16=False)),
    )
    for module, config_class, name, use in consumers:
        use()
        listed = module.CAPABILITY
        fewer = {field: values for field, values in listed.fields[config_class].items() if field != name}
        part = replace(listed, fields={**listed.fields, config_class: fewer})
        with monkeypatch.context() as patch:
            patch.setattr(module, "CAPABILITY", part)
            with pytest.raises(InputError, match=f"{listed.consumer} does not implement {name} = "):
                use()


def test_whatever_computes_attention_or_logits_says_which_fields_it_implements() -> None:
    """A module that computes a part of the decoder itself would leave a new field out."""
    root = Path(pumice.__file__).parent
    reading = [
        path
        for path in root.rglob("*.py")
        if re.search(r"_softcap|\.window\(", path.read_text(encoding="utf-8")) and "formats" not in path.parts
    ]
    # The decoder's list counts for its blocks. `loss` is handed the values, and `plan` runs what lists them.
    part = {"config.py", "capability.py", "layers.py", "loss.py", "footprint.py"}
    lacking = [p.name for p in reading if p.name not in part and "CAPABILITY" not in p.read_text("utf-8")]
    assert len(reading) > 6 and not lacking


def test_a_field_that_is_not_listed_is_refused_by_name() -> None:
    @dataclass(frozen=True)
    class Inner:
        depth: int = 1

    @dataclass(frozen=True)
    class Config:
        width: int
        inner: Inner = Inner()
        sizes: tuple[int, ...] = ()
        kind: str = "plain"

    whole = Capability("it", {Config: fields("width inner sizes kind"), Inner: fields("depth")})
    assert whole.unsupported(Config(3, Inner(2), (1,), "other")) is None
    part = Capability("the printer", {Config: fields("width inner", kind=("plain", "round"))})
    assert part.unsupported(Config(3)) is part.unsupported(Config(3, kind="round")) is None
    for config, words in (
        (Config(3, sizes=(1, 2)), "the printer does not implement sizes = (1, 2)"),
        (Config(3, Inner(2)), "the printer does not implement inner.depth = 2"),
        (Config(3, kind="flat"), "the printer does not implement kind = 'flat', only 'plain' or 'round'"),
    ):
        assert part.unsupported(config) == words
        with pytest.raises(InputError) as refusal:
            part.check(config)
        assert (
            str(refusal.value)
            == f"{words}; leave it at its default, or implement it there (docs/extending.md)"
        )
    # A field without a default is always set.
    assert (
        Capability("a", {Config: fields("inner")}).unsupported(Config(0)) == "a does not implement width = 0"
    )


# A value that differs from the default, of every field that is no size of all decoders.
DECODER_FIELDS: dict[str, dict[str, Any]] = {
    "rope_theta": {"rope_theta": 5000.0},
    "rope_scaling": {"rope_scaling": RopeScaling("linear", 4.0)},
    "norm_eps": {"norm_eps": 1e-3},
    "tied_head": {"tied_head": True},
    "qkv_bias": {"qkv_bias": True},
    "qk_norm": {"qk_norm": True},
    "sliding_window": {"sliding_window": 7},
    "window_pattern": {"sliding_window": 7, "window_pattern": 2},
    "activation": {"activation": "gelu_tanh"},
    "post_norms": {"post_norms": True},
    "norm_offset": {"norm_offset": 1.0},
    "embed_scale": {"embed_scale": 3.0},
    "attention_scale": {"attention_scale": 0.1},
    "attention_softcap": {"attention_softcap": 1.0},
    "logit_softcap": {"logit_softcap": 2.0},
}
SIZES = {"vocab_size", "width", "depth", "heads", "kv_heads", "head_dim", "mlp_width", "context"}
SIGLIP = VisionConfig(
    kind="siglip", image_size=28, width=32, stride=14, depth=2, heads=2, mlp_width=64, activation="gelu_tanh",
    layer=-1, select="full",
)  # fmt: skip


def small(**changes: Any) -> Llava:
    config = ModelConfig(
        replace(DecoderConfig(52, 64, 3, 4, 2, 16, 96, context=64), **changes), SIGLIP, ConnectorConfig()
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Llava(config).eval().requires_grad_(False)
        for parameter in model.decoder.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(noise * 0.15 if parameter.dim() == 2 else 1 + 0.5 * noise)
    return model


def test_a_value_of_every_decoder_field_is_tried() -> None:
    assert SIZES | DECODER_FIELDS.keys() == {field.name for field in dataclasses.fields(DecoderConfig)}


@pytest.mark.parametrize("name", DECODER_FIELDS)
def test_a_field_of_the_decoder_changes_what_every_engine_computes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code computes it or leaves it to PyTorch; explanations, int8 and int4 compute it as well."""
    ids = torch.arange(24) % 52
    without = {field: value for field, value in DECODER_FIELDS[name].items() if field != name}
    plain, changed = small(**without), small(**DECODER_FIELDS[name])
    logits = [model.decoder.logits(model(ids[None])) for model in (plain, changed)]
    assert not torch.allclose(*logits, atol=1e-3), "the field changes nothing"
    prompt = Prompt(ids, None, SamplingParams(max_new_tokens=12))
    tokens = [token for _, token in generate(changed, [prompt]) if token is not None]
    assert tokens == naive_generate(changed, prompt)
    # Training computes attention over packs and the loss in chunks, without any logits.
    pack = PackTensors(ids, torch.arange(24), [Run(24)], torch.arange(23), ids[1:], torch.ones(23), (), ())
    loss = torch.nn.functional.cross_entropy(logits[1][0, :-1], ids[1:], reduction="sum")
    torch.testing.assert_close(Objective(changed, None, bf16=False)(pack), loss, atol=1e-3, rtol=1e-5)
    # An explanation computes attention itself, in three ways.
    expected = logits[1][0, -5:-1].log_softmax(-1).gather(-1, ids[-4:, None])[:, 0]
    passage = Passage.of(ids[:-4], None, ids[-4:].tolist())
    for options in ({}, {"rollout": True}, {"gradient_from": 0}):
        [read_out], _ = read(changed, [passage], **options)
        torch.testing.assert_close(read_out, expected, atol=1e-4, rtol=1e-4)
    # Packed modules do what plain ones do with the same weights; only compiled products round activations.
    monkeypatch.setattr(compute, "library", lambda: None)
    for kind in KINDS:
        quantised, rounded = small(**DECODER_FIELDS[name]), small(**DECODER_FIELDS[name])
        quantize(quantised.decoder, kind)
        weights = dict(rounded.decoder.named_parameters())
        for path, module in quantised.decoder.named_modules():
            if isinstance(module, PackedLinear | PackedEmbedding) and f"{path}.weight" in weights:
                weights[f"{path}.weight"].copy_(module.packed.restored())
        expected, actual = (model.decoder.logits(model(ids[None])) for model in (rounded, quantised))
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("to", ["hf", "llava", "gguf"])
@pytest.mark.parametrize("name", DECODER_FIELDS)
def test_a_field_of_the_decoder_is_written_or_refused_by_name(
    name: str, to: str, models: ModuleType, tmp_path: Path
) -> None:
    source = models.tiny(models.ARCHITECTURES["CLIP + Llama, pad (LLaVA 1.5)"])
    config = replace(source.config, decoder=replace(source.config.decoder, **DECODER_FIELDS[name]))
    reason = REFUSALS[to](config)
    if reason is None:
        state = {n: t for n, t in source.state.items() if n != "decoder.head.weight" or name != "tied_head"}
        state |= _further_tensors(config, state)
        export(replace(source, config=config, state=state), to, tmp_path / "out")  # reads it back
    else:
        assert name in reason or name in ("qk_norm", "post_norms"), reason


def _further_tensors(config: ModelConfig, state: dict[str, Any]) -> dict[str, Any]:
    from pumice.formats.load import shapes
    from pumice.storage.tensors import as_lazy

    wanted = shapes(config)
    return {name: as_lazy(torch.ones(shape)) for name, shape in wanted.items() if name not in state}


def _vision(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    return lambda config: replace(config, vision=replace(config.vision, **changes))


def _image(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    return lambda config: replace(config, image=replace(config.image, **changes))


OTHER_FIELDS: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "vision.kind": _vision(kind="siglip", select="full"),
    "vision.variant": _vision(variant="lite0"),
    "vision.also_stride": _vision(kind="efficientnet_lite", also_stride=8),
    "vision.final_norm": _vision(final_norm=True),
    "vision.fractional": _vision(fractional=True),
    "vision.norm_eps": _vision(norm_eps=1e-3),
    "vision.layer": _vision(layer=-1),
    "vision.select": _vision(select="cls_patch"),
    "vision.activation": _vision(activation="gelu"),
    "image.mode": _image(mode="crop"),
    "image.mean": _image(mean=(0.5, 0.5, 0.5), pad_color=(127, 127, 127)),
    "image.std": _image(std=(0.5, 0.5, 0.5)),
    "image.resample": _image(resample="bilinear"),
    "image.pad_color": _image(pad_color=(1, 2, 3)),
    "image.pinpoints": _image(mode="anyres", pinpoints=((112, 56), (56, 112))),
    "image.unpad": _image(mode="anyres", pinpoints=((112, 56), (56, 112)), unpad=False),
    "image.max_tiles": _image(mode="anyres", pinpoints=((112, 56), (56, 112)), max_tiles=4),
    "image.several": _image(mode="anyres", pinpoints=((112, 56), (56, 112)), several="square"),
    "image.longest_edge": _image(longest_edge=112),
    "image.enlarge": _image(enlarge=False),
    "connector.kind": lambda config: replace(config, connector=ConnectorConfig("linear")),
    "connector.reduce": lambda config: replace(config, connector=ConnectorConfig(reduce="average", factor=2)),
    "connector.factor": lambda config: replace(config, connector=ConnectorConfig("linear", "average", 2)),
    "connector.bias": lambda config: replace(config, connector=ConnectorConfig(bias=False)),
}
# What a refusal says in place of a field's name.
WORDS = {
    "also_stride": "EfficientNet-Lite", "select": "class token", "unpad": "tiles", "pinpoints": "tiles",
    "max_tiles": "tiles", "several": "tiles", "pad_color": "it pads with", "reduce": "average",
    "factor": "average",
}  # fmt: skip


def test_a_value_of_every_field_of_tower_pictures_and_connector_is_tried() -> None:
    sizes = {f"vision.{name}" for name in ("image_size", "width", "stride", "depth", "heads", "mlp_width")}
    classes = {"vision": VisionConfig, "image": ImagePolicy, "connector": ConnectorConfig}
    fields = {f"{part}.{field.name}" for part, kind in classes.items() for field in dataclasses.fields(kind)}
    assert OTHER_FIELDS.keys() | sizes == fields


@pytest.mark.parametrize("to", ["hf", "llava", "gguf"])
@pytest.mark.parametrize("name", OTHER_FIELDS)
def test_a_field_of_tower_pictures_and_connector_is_written_or_refused(
    name: str, to: str, models: ModuleType, tmp_path: Path
) -> None:
    """hf and llava are read back whole, so a field that is lost cannot pass."""
    source = models.tiny(models.ARCHITECTURES["CLIP + Llama, pad (LLaVA 1.5)"])
    config = OTHER_FIELDS[name](source.config)
    assert config != source.config
    if (reason := REFUSALS[to](config)) is not None:
        field = name.partition(".")[2]
        assert field in reason or WORDS[field] in reason
        return
    state = dict(source.state)
    if name == "vision.kind":  # which has no class token, and biases of its own
        state = {n: t for n, t in state.items() if not n.startswith("tower.")}
    if name.startswith("connector"):
        state = {n: t for n, t in state.items() if not n.startswith("connector.layers.2")}
    state |= _further_tensors(config, state)
    export(replace(source, config=config, state=state), to, tmp_path / "out")
    if to == "hf" and not name.startswith("connector"):
        written = read_model(tmp_path / "out").config
        image = config.image
        if name == "image.several":  # squares need a limit there: one that no picture reaches
            image = replace(image, max_tiles=2)
        assert (written.vision, written.image) == (config.vision, image)


def test_what_a_format_loses_is_refused_before_it_appears(
    models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a writer would that has forgotten a field: its file says another number."""
    text_config = hf_write.text_config
    monkeypatch.setattr(hf_write, "text_config", lambda config: text_config(config) | {"rms_norm_eps": 0.5})
    source = models.tiny(models.ARCHITECTURES["CLIP + Llama, pad (LLaVA 1.5)"])
    with pytest.raises(InputError, match=r"does not keep decoder\.norm_eps: 1e-05 would .* as 0\.5"):
        export(source, "hf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def _forget(name: str) -> Callable[..., dict[str, Any]]:
    written = hf_write.generation_config
    return lambda config: {key: value for key, value in written(config).items() if key != name}


@pytest.mark.parametrize(
    ("name", "forgetful", "words"),
    [
        ("generation_config", _forget("top_k"), r"the generation: .*top_k=0.* come back as .*top_k=50"),
        (
            "generation_config",
            _forget("do_sample"),
            r"the generation: .*temperature=0\.5.* as .*temperature=0\.0",
        ),
        ("to_jinja", lambda *_: to_jinja(get_template("v0")), r"the chat template: after '.*' it writes '"),
        (
            "to_jinja",
            lambda template, wrap=None: to_jinja(template),
            r"the chat template: it writes None around a picture",
        ),
    ],
)
def test_what_a_format_loses_of_the_text_side_is_refused(
    name: str, forgetful: Callable[..., Any], words: str, models: ModuleType, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source = models.tiny(models.ARCHITECTURES["CLIP + Llama, linear, crop (LLaVA 1.0)"])
    config = replace(source.config, template="v1", generation=GenerationConfig(0.5, 0.9))
    export(replace(source, config=config), "hf", tmp_path / "whole")
    monkeypatch.setattr(hf_write, name, forgetful)
    with pytest.raises(InputError, match=f"hf does not keep {words}"):
        export(replace(source, config=config), "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["hf", "llava"])
@pytest.mark.parametrize("stops", [(2,), ()])
def test_other_stop_tokens_are_refused(
    to: str, stops: tuple[int, ...], models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = hf_write if to == "hf" else llava_write
    written = module.generation_config
    monkeypatch.setattr(module, "generation_config", lambda config: written(config) | {"eos_token_id": [1]})
    source = models.tiny(models.ARCHITECTURES["CLIP + Llama, pad (LLaVA 1.5)"])
    source = replace(source, config=replace(source.config, stop_token_ids=stops))
    expected = re.escape(f"{to} does not keep the stop_token_ids: {stops} would come back as (1,)")
    with pytest.raises(InputError, match=expected):
        export(source, to, tmp_path / "out")


def test_a_tower_refuses_fields_of_another_kind() -> None:
    for config, words in (
        (replace(SIGLIP, variant="lite0"), "a tower of kind siglip does not implement variant = 'lite0'"),
        (VisionConfig(depth=2), "a tower of kind efficientnet_lite does not implement depth = 2"),
    ):
        with pytest.raises(InputError) as refusal:
            Llava(ModelConfig(DecoderConfig(52, 64, 1, 4, 2, 16, 96), config))
        assert str(refusal.value).startswith(f"{words}; ")
