"""The shape of a recipe's model, and what prepares its samples; its weights are not read.

Knows: configs on this disk, and the published sizes of the models that the shipped recipes name. Does not
know tensors. A config that is here goes before the table; the table is only for planning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from pumice.config import (
    ConnectorConfig,
    DecoderConfig,
    ImagePolicy,
    LoraConfig,
    ModelConfig,
    VisionConfig,
    as_stored,
    from_dict,
)
from pumice.errors import InputError
from pumice.formats.components import describe_tower
from pumice.formats.gguf.llm import open_gguf
from pumice.formats.hf.config import decoder_config, default_policy, padding
from pumice.formats.load import new_parts
from pumice.formats.pumice.folder import CONFIG
from pumice.formats.read import find_model, read_model
from pumice.processor import Processor
from pumice.storage.download import from_hub
from pumice.storage.json_file import Keys, read_json
from pumice.storage.parts import LoadedParts
from pumice.tokens import Tokenizer
from pumice.train.recipe import NewModel, Recipe, load_recipe


def _llama(vocab: int, width: int, depth: int, heads: int, mlp: int, context: int) -> DecoderConfig:
    return DecoderConfig(vocab, width, depth, heads, heads, width // heads, mlp, context)


def _grouped(
    vocab: int, width: int, depth: int, heads: int, shared: int, mlp: int, context: int, *,
    qwen: bool = False, tied: bool = False,
) -> DecoderConfig:  # fmt: skip
    return DecoderConfig(
        vocab, width, depth, heads, shared, width // heads, mlp, context, qkv_bias=qwen, tied_head=tied
    )


def _vit(kind: str, size: int, width: int, stride: int, depth: int, heads: int, mlp: int) -> VisionConfig:
    select = "patch" if kind == "clip" else "full"
    return VisionConfig(
        kind, size, width, stride, depth=depth, heads=heads, mlp_width=mlp, select=select,
        activation="quick_gelu" if kind == "clip" else "gelu_tanh",
    )  # fmt: skip


# As the config.json of each says.
DECODERS = {
    "lmsys/vicuna-7b-v1.3": _llama(32000, 4096, 32, 32, 11008, 2048),
    "lmsys/vicuna-13b-v1.3": _llama(32000, 5120, 40, 40, 13824, 2048),
    "lmsys/vicuna-7b-v1.5": _llama(32000, 4096, 32, 32, 11008, 4096),
    "lmsys/vicuna-13b-v1.5": _llama(32000, 5120, 40, 40, 13824, 4096),
    "mistralai/Mistral-7B-Instruct-v0.2": _grouped(32000, 4096, 32, 32, 8, 14336, 32768),
    "meta-llama/Meta-Llama-3-8B-Instruct": _grouped(128256, 4096, 32, 32, 8, 14336, 8192),
    "Qwen/Qwen2.5-0.5B-Instruct": _grouped(151936, 896, 24, 14, 2, 4864, 32768, qwen=True, tied=True),
    "Qwen/Qwen2.5-1.5B-Instruct": _grouped(151936, 1536, 28, 12, 2, 8960, 32768, qwen=True, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": _grouped(152064, 3584, 28, 28, 4, 18944, 32768, qwen=True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _grouped(49152, 960, 32, 15, 5, 2560, 8192, tied=True),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _grouped(49152, 576, 30, 9, 3, 1536, 8192, tied=True),
    "smollm2-135m-instruct": _grouped(49152, 576, 30, 9, 3, 1536, 8192, tied=True),
}
TOWERS = {
    "openai/clip-vit-base-patch32": _vit("clip", 224, 768, 32, 12, 12, 3072),
    "openai/clip-vit-base-patch16": _vit("clip", 224, 768, 16, 12, 12, 3072),
    "openai/clip-vit-large-patch14": _vit("clip", 224, 1024, 14, 24, 16, 4096),
    "openai/clip-vit-large-patch14-336": _vit("clip", 336, 1024, 14, 24, 16, 4096),
    "google/siglip-base-patch16-224": _vit("siglip", 224, 768, 16, 12, 12, 3072),
    "google/siglip-so400m-patch14-384": _vit("siglip", 384, 1152, 14, 27, 16, 4304),
}


def _llava_hf(decoder: str) -> ModelConfig:
    """transformers' LLaVA-1.5: the vocabulary is padded to 32,064 rows."""
    vision = TOWERS["openai/clip-vit-large-patch14-336"]
    language = dataclasses.replace(DECODERS[decoder], vocab_size=32064)
    return ModelConfig(language, vision, ConnectorConfig("mlp2x_gelu"), default_policy(vision), template="v1")


LLAVAS: dict[str, Callable[[], ModelConfig]] = {
    "llava-hf/llava-1.5-7b-hf": lambda: _llava_hf("lmsys/vicuna-7b-v1.5"),
    "llava-hf/llava-1.5-13b-hf": lambda: _llava_hf("lmsys/vicuna-13b-v1.5"),
    "liuhaotian/llava-v1.5-7b": lambda: _llava_hf("lmsys/vicuna-7b-v1.5"),
    "liuhaotian/llava-v1.5-13b": lambda: _llava_hf("lmsys/vicuna-13b-v1.5"),
}


def shape(recipe: Recipe, path: Path | None = None) -> tuple[ModelConfig, list[str]]:
    """The config of the recipe's model with the stage's fresh adapters, and notes on where it is from.

    path: of the recipe; a stage that goes on from a model which is still to be trained has the shape of
    what the recipe beside it will write. Raises InputError when nothing says the shape.
    """
    notes: list[str] = []
    config = with_adapters(recipe, _of(recipe, path, notes))
    recipe.stage_config(config)  # refuses what the stage cannot have of this model
    return config, notes


def with_adapters(recipe: Recipe, config: ModelConfig) -> ModelConfig:
    """The config with the fresh adapters that the stage gives the model."""
    if recipe.stage.lora is None or config.lora is not None:
        return config
    return dataclasses.replace(config, lora=LoraConfig(**recipe.stage.lora.model_dump()))


def _of(recipe: Recipe, path: Path | None, notes: list[str]) -> ModelConfig:
    if isinstance(recipe.model, NewModel):
        return _new(recipe.model, notes)
    name = recipe.model.as_posix()
    if not recipe.model.exists():
        if path is not None and (found := _before(recipe, path)) is not None:
            notes.append(f"{name} is still to be made: the shape is that of {found[1].name}")
            return with_adapters(found[0], _of(found[0], found[1], notes))
        if name in LLAVAS:
            notes.append(f"the sizes of {name} are the published ones; its files were not read")
            return LLAVAS[name]()
    here = find_model(recipe.model)
    if (here / CONFIG).is_file() and "pumice_format" in (values := read_json(here / CONFIG)):
        return ModelConfig.from_dict(values)
    return read_model(recipe.model).config


def _before(recipe: Recipe, path: Path) -> tuple[Recipe, Path] | None:
    """The recipe in the same folder whose finished model this one goes on from."""
    for other in sorted(path.parent.glob("*.y*ml")):
        if other.resolve() == path.resolve():
            continue
        try:
            found = load_recipe(other)
        except InputError:
            continue  # a neighbour that is no recipe is not this one's fault
        if found.output / "model" == recipe.model:
            return found, other
    return None


def _new(new: NewModel, notes: list[str]) -> ModelConfig:
    vision, policy = _tower(new, notes)
    values = as_stored(policy) | new.image
    image = from_dict(ImagePolicy, values, "model.image")
    if "pad_color" not in new.image and vision.kind != "efficientnet_lite":
        image = dataclasses.replace(image, pad_color=padding(image.mean))
    connector = from_dict(ConnectorConfig, new.connector, "model.connector")
    return ModelConfig(_decoder(new.decoder, notes), vision, connector, image, template=new.template)


def _tower(new: NewModel, notes: list[str]) -> tuple[VisionConfig, ImagePolicy]:
    if "kind" in new.vision:  # a wheel or file that says nothing of itself
        return from_dict(VisionConfig, new.vision, "model.vision"), ImagePolicy()
    folder = Path(new.tower).expanduser()
    if folder.is_dir():
        own, policy = describe_tower(folder)
    elif new.tower in TOWERS:
        notes.append(f"the sizes of {new.tower} are the published ones; its files were not read")
        own = TOWERS[new.tower]
        policy = default_policy(own)
    else:
        own, policy = describe_tower(from_hub(new.tower, ["config.json", "preprocessor_config.json"]))
    return from_dict(VisionConfig, as_stored(own) | new.vision, "model.vision"), policy


def _decoder(name: str, notes: list[str]) -> DecoderConfig:
    path = Path(name).expanduser()
    if path.is_file():
        return open_gguf(path).config
    if path.is_dir():
        return decoder_config(Keys.of(path / "config.json"))
    if name in DECODERS:
        notes.append(f"the sizes of {name} are the published ones; its files were not read")
        return DECODERS[name]
    return decoder_config(Keys.of(from_hub(name, ["config.json"]) / "config.json"))


def read_parts(recipe: Recipe) -> LoadedParts:
    """The recipe's model in parts, its weights not read yet; torch's generator stays as it was."""
    if not isinstance(recipe.model, NewModel):
        return read_model(recipe.model)
    new = recipe.model
    with torch.random.fork_rng(devices=[]):
        return new_parts(
            new.tower, new.decoder, vision=new.vision, connector=new.connector, image=new.image,
            template=new.template,
        )  # fmt: skip


def processor_of(recipe: Recipe) -> Processor:
    """What prepares the stage's samples."""
    loaded = read_parts(recipe)
    return Processor(
        recipe.stage_config(loaded.config), Tokenizer(loaded.tokenizer), truncate=recipe.truncate
    )
