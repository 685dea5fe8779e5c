"""A recipe holds every setting of a training run; its fields are typed and checked when it is read.

Relative paths start at the folder in which the command runs. Only `extends` starts at the file that names it.
`pumice:finetune` is a recipe that Pumice brings, from anywhere.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pumice.capability import MODE_FIELDS, MODE_MARKS, MODE_VIDEO, only
from pumice.config import ImagePolicy, ModelConfig
from pumice.config_json import as_stored, from_dict
from pumice.errors import InputError, counted
from pumice.media import BoxFormName
from pumice.storage.yaml_file import read_yaml, set_key
from pumice.templates import OWN
from pumice.train.recipe_errors import main_problem, missing_base, missing_recipe
from pumice.train.shipped import SHIPPED, shipped_recipe

LONGEST_CHAIN = 50  # recipes that extend each other
PARTS = ("tower", "connector", "decoder", "lora", "embeddings", "image_newline")
# Some blocks of a part, the last one included, counted from 0: decoder.28-31.
BLOCKS = re.compile(r"(decoder|tower)\.(\d{1,4})-(\d{1,4})")


def _known_part(name: str) -> str:
    blocks = BLOCKS.fullmatch(name)
    if name not in PARTS and blocks is None:
        raise PydanticCustomError("unknown_part", "unknown part")
    if blocks is not None and int(blocks[2]) > int(blocks[3]):
        raise ValueError(f"{name}: the first block comes after the last")
    return name


Part = Annotated[str, AfterValidator(_known_part)]
Beta = Annotated[float, Field(ge=0, lt=1)]
_LATER: dict[str, Any] = {"later": True}


def later(default: Any, description: str) -> Any:
    """Return a field that earlier versions lack: it is written only where it is not the default.

    So runs that they began resume, and they can resume runs that do without it.
    """
    return Field(default, description=description, json_schema_extra=_LATER)


class RecipeSection(BaseModel):
    """A mapping inside a recipe; a key that is not a field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _as_written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the fields that came later, where they have their default."""
        values: dict[str, Any] = write(self)
        return {name: value for name, value in values.items() if not self._is_later(name)}

    def _is_later(self, name: str) -> bool:
        field = type(self).model_fields[name]
        return field.json_schema_extra == _LATER and getattr(self, name) == field.default


class NewModel(RecipeSection):
    """A model that is put together from a vision tower, an LLM and a new connector."""

    tower: str = Field(description="a known wheel, or a CLIP's or SigLIP's folder or hub name")
    decoder: str = Field(description="the LLM: a known wheel, folder, hub name or GGUF file")
    vision: dict[str, Any] = Field(default={}, description="fields of VisionConfig")
    connector: dict[str, Any] = Field(default={}, description="fields of ConnectorConfig")
    image: dict[str, Any] = Field(default={}, description="fields of ImagePolicy; else the tower's own")
    template: str = Field("chatml", description="the chat format of the finished model")


class NewConnector(RecipeSection):
    """An existing model with a new connector."""

    base: Path = Field(description="a model folder or hub name")
    connector: dict[str, Any] = Field(description="fields of ConnectorConfig")


def _model_kind(value: Any) -> str:
    if isinstance(value, NewConnector) or (isinstance(value, dict) and "base" in value):
        return "NewConnector"
    return "NewModel" if isinstance(value, NewModel | dict) else "Path"


# Which of the three is meant shows in the value, so that an error names the keys of that one.
ModelSource = Annotated[
    Annotated[Path, Tag("Path")]
    | Annotated[NewConnector, Tag("NewConnector")]
    | Annotated[NewModel, Tag("NewModel")],
    Discriminator(_model_kind),
]


class Lora(RecipeSection):
    """Low-rank adapters (LoRA, arXiv 2106.09685) on the LLM's projections."""

    rank: PositiveInt = 16
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = Field(
        ("q", "k", "v", "o", "gate", "up", "down"), min_length=1
    )


class Stage(RecipeSection):
    """The parts that learn, each at its own rate. A part that is not named is frozen."""

    learn: dict[Part, float] = Field(
        description="part -> peak learning rate; blocks of a part are decoder.28-31 or tower.20-22"
    )
    template: str | None = Field(None, description="the stage's own template; the model's when absent")
    image: dict[str, Any] = Field(
        default={}, description="fields of ImagePolicy for this stage alone; the model keeps its own"
    )
    lora: Lora | None = Field(None, description="new adapters on the LLM; learn: lora needs them")
    base: Literal["none", "int8", "nf4"] = Field(
        "none", description="how the LLM's frozen weights are stored under the adapters (QLoRA)"
    )

    def learns(self, part: str) -> bool:
        """Return whether a part learns, or some of its blocks."""
        return part in self.learn or any(name.startswith(f"{part}.") for name in self.learn)

    @model_validator(mode="after")
    def _something_learns(self) -> Stage:
        if not self.learn:
            raise ValueError("learn names no part; nothing would be trained")
        for part, rate in self.learn.items():
            if rate <= 0:
                raise ValueError(f"learn: {part} has the rate {rate}; give a number above 0 or leave it out")
        if self.lora is not None and "lora" not in self.learn:
            raise ValueError("lora describes adapters, but learn gives them no rate; add lora to learn")
        if self.base != "none" and "lora" not in self.learn:
            raise ValueError(f"base: {self.base} is for adapters to learn on; add lora to learn")
        if self.base != "none" and (self.learns("decoder") or "embeddings" in self.learn):
            raise ValueError(f"base: {self.base} freezes the LLM; take decoder and embeddings out of learn")
        return self


def _as_path(value: Any) -> Any:
    """Write a path as `Path` does, but leave the name of a set on the hub as it is."""
    is_path = isinstance(value, str | PathLike) and not str(value).startswith("hf://")
    return str(Path(value)) if is_path else value


class RowSource(RecipeSection):
    """One source of rows, and how often an epoch shows them."""

    rows: Annotated[str, BeforeValidator(_as_path)] = Field(
        min_length=1,
        description="rows in any format that docs/data.md lists: a file, a folder, a glob, hf://owner/name",
    )
    weight: float = Field(1.0, gt=0, description="how often an epoch shows each row; 0.5 is a random half")
    mirror: bool = Field(False, description="pictures may be mirrored, as no row speaks of left and right")
    columns: dict[str, str] = later({}, "role (image, question, answer, ...) -> the column that has it")
    question: str | None = later(None, "what is asked about a caption, a text or a label")
    split: str | None = later(None, "of a set with several, by the names of files or the card")
    config: str | None = later(None, "of a set with several: the folder, or the card's name")
    revision: str | None = later(None, "of a set on the hub: a branch, a tag or a commit")


class Recipe(RecipeSection):
    """Every setting of one training run."""

    name: str
    output: Path = Field(description="folder of checkpoints, metrics and the finished model")
    model: ModelSource = Field(
        description="a model folder or hub name, the same with a new connector, or the parts of a new one"
    )
    stage: Stage
    data: list[RowSource] = Field(min_length=1)
    held_out: list[RowSource] = Field(default=[], description="rows whose loss is measured, never learned")
    pictures: list[Path] = Field(default=[], description="folders that hold the rows' pictures")
    boxes: BoxFormName | None = later(None, "how boxes are written (docs/boxes.md); else the model's own way")
    max_bad_rows: int = Field(0, ge=0, description="bad rows to skip before the run stops")
    context: PositiveInt | None = Field(None, description="longest row in tokens; the LLM's when absent")
    truncate: bool = Field(
        False, description="cut longer rows, never inside a picture; otherwise they are bad rows"
    )

    epochs: float = Field(1.0, gt=0)
    max_steps: PositiveInt | None = Field(None, description="stop after this many optimiser steps")
    batch: PositiveInt = Field(32, description="pictures (with all their rows) per optimiser step")
    pack_tokens: PositiveInt = Field(
        1024, description="tokens per pack; one pack is in memory at a time; on CUDA 8,192 when absent"
    )
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps with a rising rate")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["fp32", "tf32", "bf16"] = "bf16"
    device: str | None = Field(None, description="cuda, mps or cpu; the best one of this machine when absent")
    seed: int = Field(0, ge=0)
    deterministic: bool = later(
        False, "the same bits from every run on CUDA, at some speed; a CPU gives them anyway"
    )
    mirror_chance: float = Field(0.5, ge=0, le=1, description="share of mirrored groups, where allowed")
    feature_cache: Path | None = Field(None, description="folder for a frozen tower's features")

    optimizer: Literal["adamw", "adamw8bit"] = Field("adamw", description="8-bit states need bitsandbytes")
    shuffle_block: PositiveInt | None = later(
        None, "rows that stay together in the order; when absent 1 for plain files, else 1,000"
    )
    order: Literal["pack", "length_grouped"] = Field(
        "pack", description="rows of a step at random, or of like length and kind, as LLaVA's own sampler"
    )
    loss_average: Literal["tokens", "micro_batch"] = Field(
        "tokens", description="over all supervised tokens of the step, or of each pack and then over packs"
    )
    checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="what is computed again to save memory: nothing, the MLPs, or whole blocks"
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="under torchrun: copies (ddp) or shards (fsdp); auto shards where copies do not fit",
    )
    workers: PositiveInt = Field(1, description="threads that prepare rows and pictures ahead of the step")
    compile: bool = Field(False, description="torch.compile the blocks; pays on GPUs and in long runs")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default=[], description="where metrics also go")

    save_every: PositiveInt = 100
    keep_last: PositiveInt = 2
    measure_every: PositiveInt | None = Field(
        None, description="steps between held-out losses; a tenth of the run, at most 100, when absent"
    )
    measure_rows: PositiveInt = Field(200, description="held-out pictures measured each time")
    sample_answers: int = Field(4, ge=0, description="held-out questions answered at each measurement")

    @field_validator("stage")
    @classmethod
    def _new_connector_learns(cls, stage: Stage, info: ValidationInfo) -> Stage:
        model = info.data.get("model")
        is_new = isinstance(model, NewConnector) and model.connector.get("kind") != "identity"
        if is_new and "connector" not in stage.learn:
            raise ValueError("the new connector's weights are random; add connector to stage.learn")
        return stage

    def stored(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """Return the recipe as JSON values, without some fields."""
        fields: dict[str, Any] = json.loads(self.model_dump_json(exclude=set(exclude)))
        return fields

    @property
    def base(self) -> Path | None:
        """The existing model that the run starts from, if its parts are not named one by one."""
        if isinstance(self.model, NewModel):
            return None
        return self.model.base if isinstance(self.model, NewConnector) else self.model

    def stage_config(self, config: ModelConfig) -> ModelConfig:
        """Return the model's config with the stage's own image policy, context, template and boxes.

        Raises InputError on an unknown field of `stage.image`, on tiles for a model without
        `image_newline`, and on a longer context than the LLM's.
        """
        # The stage's fields replace the model's one by one. Fields that it does not name stay, if its mode
        # uses them.
        image, marks, video = config.image, config.marks, config.video
        if self.stage.image:
            values = as_stored(config.image)
            used = MODE_FIELDS.get(self.stage.image.get("mode", image.mode), "").split()
            values = {name: value for name, value in values.items() if name in used} | self.stage.image
            image = from_dict(ImagePolicy, values, "stage.image")
        if image.mode != config.image.mode:
            marks, video = only(MODE_MARKS[image.mode], marks), only(MODE_VIDEO[image.mode], video)
        # Blocks have to be there.
        depths = {"decoder": config.decoder.depth, "tower": config.vision.depth}
        for name in self.stage.learn:
            if (blocks := BLOCKS.fullmatch(name)) and int(blocks[3]) >= (depth := depths[blocks[1]]):
                raise InputError(
                    f"stage.learn names {name}, but the {blocks[1]} has {counted(depth, 'block')}, counted "
                    "from 0"
                )
        # A stage may shorten the context to save memory, but the LLM has no positions beyond its own.
        decoder = config.decoder
        if self.context is not None:
            if self.context > decoder.context:
                raise InputError(
                    f"context: {self.context} tokens, the LLM takes {decoder.context}; "
                    "lower it or leave it out"
                )
            decoder = dataclasses.replace(decoder, context=self.context)
        template = self.stage.template or config.template
        chat = config.chat if template == OWN else None
        boxes = self.boxes or config.boxes
        staged = dataclasses.replace(
            config, image=image, marks=marks, video=video, decoder=decoder, template=template, chat=chat,
            boxes=boxes,
        )  # fmt: skip
        # Tiles end each row with a learned vector. A stage cannot add it: it is one of the model's weights.
        if staged.has_newline and not config.has_newline:
            raise InputError(
                "stage.image: tiles need the model's image_newline; write mode anyres into model.image"
            )
        return staged


def recipe_path(path: str | Path) -> Path:
    """Return the path of a recipe's file, also where it is named pumice:NAME. Raises InputError."""
    return shipped_recipe(str(path), "") if str(path).startswith(SHIPPED) else Path(path)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe with the recipes that it extends, and apply "key=value" overrides.

    `extends: other.yaml` starts from the keys of another file, whose path is relative to this one's folder;
    `extends: pumice:finetune` from a recipe that Pumice brings, whose name may also stand for `path`.
    Mappings are merged key by key, anything else is replaced, and null removes a key.

    Raises InputError that names the file, the key and the nearest known key, and where files extend each
    other in a circle.
    """
    # 1. Merge the files. `origin` remembers which file sets which key, so that an error can name it.
    origin: dict[tuple[str, ...], str] = {}
    path = recipe_path(path)
    if not path.exists():
        raise missing_recipe(path)
    values = _read(path, (), origin)
    # 2. Overrides come last, because they replace what any of the files says.
    set_keys = []
    for override in overrides:
        set_keys.append(set_key(values, override))
        origin[set_keys[-1]] = f"--set {override}"
        if set_keys[-1] == ("extends",):
            raise InputError(f"--set {override}: extends can be set in the recipe's file only")
    # 3. Validate only the merged values: a recipe that is extended need not be complete by itself.
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        loc, message = main_problem(error, _KNOWN_KEYS, PARTS, set_keys)
        # A missing key has no origin. Then name the file that sets the mapping around it.
        origins = [origin[loc[:end]] for end in range(len(loc), 0, -1) if loc[:end] in origin]
        raise InputError(f"{next(iter(origins), path)}: {message}") from error


def _read(path: Path, chain: tuple[Path, ...], origin: dict[tuple[str, ...], str]) -> dict[str, Any]:
    """Read the keys of a file, merged over those of the file that it extends.

    chain: the files that extend this one, for the check against circles. `origin` gets the file of each key.
    """
    if path.resolve() in chain:
        circle = " -> ".join(p.name for p in (*chain, path))
        raise InputError(f"{chain[-1]}: extends goes in a circle, {circle}; take one of them out")
    if len(chain) > LONGEST_CHAIN:
        raise InputError(
            f"{chain[0]}: more than {LONGEST_CHAIN} recipes extend each other; join some of them"
        )
    values = read_yaml(path)
    if "extends" not in values:
        _record_origin(values, str(path), origin)
        return values
    base_name = values.pop("extends")
    if not isinstance(base_name, str) or not Path(base_name).name:
        raise InputError(f"{path}: extends must be the path of one recipe, not {base_name!r}")
    if base_name.startswith(SHIPPED):
        base_path = shipped_recipe(base_name, f"{path}: extends ")
    else:
        base_path = path.parent / base_name
    if not base_path.is_file():
        raise missing_base(path, base_name, base_path)
    # The base comes first, so that this file's keys replace it in `origin` as they do in the values.
    base = _read(base_path, (*chain, path.resolve()), origin)
    _record_origin(values, str(path), origin)
    return _merge(base, values)


def _record_origin(
    values: Any, file_name: str, origin: dict[tuple[str, ...], str], keys: tuple[str, ...] = ()
) -> None:
    """Record in `origin` that `file_name` sets every key of `values`; `keys` lead to `values` itself."""
    if keys:
        origin[keys] = file_name
    items = (
        values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    )
    for key, value in items:
        _record_origin(value, file_name, origin, (*keys, str(key)))


def _merge(base: Any, over: Any) -> Any:
    """Return `base` with the keys of `over` in their place; anything but two mappings is replaced whole."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    merged = {key: value for key, value in base.items() if key not in over}
    for key, value in over.items():
        if value is not None:
            merged[key] = _merge(base.get(key), value)
        elif key not in base:
            # There is nothing to remove: null is this field's value, or the key is unknown and an error.
            merged[key] = None
    return merged


# Every key of a recipe, from its top; in lists stands the number of the first entry.
_KNOWN_KEYS = [
    f"{prefix}{name}"
    for prefix, section in (
        ("", Recipe), ("stage.", Stage), ("stage.lora.", Lora), ("data.0.", RowSource),
        ("model.", NewModel), ("model.", NewConnector),
    )
    for name in section.model_fields
]  # fmt: skip
