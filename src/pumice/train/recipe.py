"""A recipe: everything that decides a training run, typed and checked when it is read.

Knows fields and their meaning. Does not know torch. Relative paths are relative to the folder in
which the command runs; only `extends` is relative to the file that says it.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from pumice.config import ImagePolicy, ModelConfig, as_stored, from_dict
from pumice.errors import InputError

Part = Literal["tower", "connector", "decoder", "lora", "embeddings", "image_newline"]


Beta = Annotated[float, Field(ge=0, lt=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NewModel(Strict):
    """A model put together from a bare tower, a bare LLM and a fresh connector."""

    tower: str = Field(description="a known wheel, or a CLIP's or SigLIP's folder or hub name")
    decoder: str = Field(description="the LLM: a known wheel, folder, hub name or GGUF file")
    vision: dict[str, Any] = Field(default={}, description="fields of VisionConfig")
    connector: dict[str, Any] = Field(default={}, description="fields of ConnectorConfig")
    image: dict[str, Any] = Field(default={}, description="fields of ImagePolicy; else as the tower says")
    template: str = Field("chatml", description="the chat format of the finished model")


class Lora(Strict):
    rank: PositiveInt = 16
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = Field(
        ("q", "k", "v", "o", "gate", "up", "down"), min_length=1
    )


class Stage(Strict):
    """Which parts learn, each at its own rate. What is not named is frozen."""

    learn: dict[Part, float] = Field(description="part -> peak learning rate")
    template: str | None = Field(None, description="the stage's own template; the model's when absent")
    image: dict[str, Any] = Field(
        default={}, description="fields of ImagePolicy for this stage alone; the model keeps its own"
    )
    lora: Lora | None = Field(None, description="fresh adapters on the LLM; learn: lora needs them")
    base: Literal["none", "int8", "nf4"] = Field(
        "none", description="how the LLM's frozen weights are held under the adapters (QLoRA)"
    )

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
        if self.base != "none" and {"decoder", "embeddings"} & set(self.learn):
            raise ValueError(f"base: {self.base} freezes the LLM; take decoder and embeddings out of learn")
        return self


class Source(Strict):
    rows: Path = Field(description="LLaVA rows, .json or .jsonl")
    weight: float = Field(1.0, gt=0, description="how often an epoch shows each row; 0.5 is a random half")
    mirror: bool = Field(False, description="pictures may be mirrored: no row speaks of left and right")


class Recipe(Strict):
    name: str
    output: Path = Field(description="folder of checkpoints, metrics and the finished model")
    model: Path | NewModel = Field(description="a model folder or hub name, or the parts of a new one")
    stage: Stage
    data: list[Source] = Field(min_length=1)
    held_out: list[Source] = Field(default=[], description="rows whose loss is measured, never learned")
    pictures: list[Path] = Field(default=[], description="folders in which the rows' pictures are found")
    max_bad_rows: int = Field(0, ge=0, description="spoiled rows to skip before the run stops")
    context: PositiveInt | None = Field(None, description="longest row in tokens; the LLM's when absent")
    truncate: bool = Field(
        False, description="cut longer rows, never inside a picture; otherwise they are spoiled rows"
    )

    epochs: float = Field(1.0, gt=0)
    max_steps: PositiveInt | None = Field(None, description="stop after this many optimiser steps")
    batch: PositiveInt = Field(32, description="pictures (with all their rows) per optimiser step")
    pack_tokens: PositiveInt = Field(1024, description="tokens per pack: what is in memory at once")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps with a rising rate")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["fp32", "tf32", "bf16"] = "bf16"
    device: str | None = Field(None, description="cuda, mps or cpu; the best one here when absent")
    seed: int = Field(0, ge=0)
    mirror_chance: float = Field(0.5, ge=0, le=1, description="share of mirrored groups, where allowed")
    feature_cache: Path | None = Field(None, description="folder for a frozen tower's features")

    optimizer: Literal["adamw", "adamw8bit"] = Field("adamw", description="8-bit states need bitsandbytes")
    order: Literal["pack", "length_grouped"] = Field(
        "pack", description="rows of a step at random, or of like length and kind, as LLaVA's own sampler"
    )
    loss_average: Literal["tokens", "micro_batch"] = Field(
        "tokens", description="over all supervised tokens of the step, or of each pack and then over packs"
    )
    checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="what is computed again instead of kept: nothing, the MLPs, or whole blocks"
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="under torchrun: whole copies, or shards; auto shards where copies do not fit"
    )
    workers: PositiveInt = Field(1, description="threads that prepare rows and pictures ahead of the step")
    compile: bool = Field(False, description="torch.compile the blocks; pays on GPUs and in long runs")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default=[], description="told beside the metrics")

    save_every: PositiveInt = 100
    keep_last: PositiveInt = 2
    measure_every: PositiveInt = Field(100, description="steps between held-out losses")
    measure_rows: PositiveInt = Field(200, description="held-out pictures measured each time")
    sample_answers: int = Field(4, ge=0, description="held-out questions answered at each measuring")

    def stage_config(self, config: ModelConfig) -> ModelConfig:
        """How this stage prepares its input: the model's config with what the stage has of its own.

        Raises InputError on an unknown field of `stage.image`, on tiles for a model without
        `image_newline`, and on a longer context than the LLM's.
        """
        image = config.image
        if self.stage.image:
            values = as_stored(config.image) | self.stage.image
            image = from_dict(ImagePolicy, values, "stage.image")
        decoder = config.decoder
        if self.context is not None:
            if self.context > decoder.context:
                raise InputError(
                    f"context: {self.context} tokens, the LLM takes {decoder.context}; "
                    "lower it or leave it out"
                )
            decoder = dataclasses.replace(decoder, context=self.context)
        template = self.stage.template or config.template
        changed = dataclasses.replace(config, image=image, decoder=decoder, template=template)
        if changed.has_newline and not config.has_newline:
            raise InputError(
                "stage.image: tiles need the model's image_newline; write mode anyres into model.image"
            )
        return changed


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, what it extends, and apply "key=value" overrides.

    `extends: other.yaml` takes another file's keys first, beside this one: mappings are merged key by
    key, anything else is replaced, and null takes a key away. InputError names the file, the key and the
    nearest known one; also when files extend each other in a circle.
    """
    origin: dict[tuple[str, ...], str] = {}
    values = _read(Path(path), (), origin)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise InputError(f"--set {override}: write key=value")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--set {override}: the value is not YAML; quote it as in a recipe") from error
        keys = key.strip().split(".")
        _put(values, keys, parsed, override)
        origin[tuple(keys)] = f"--set {override}"
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        loc, message = _first(error)
        # told of the file that says the key, or else of the one around it
        places = [origin[loc[:end]] for end in range(len(loc), 0, -1) if loc[:end] in origin]
        raise InputError(f"{next(iter(places), path)}: {message}") from error


def _read(path: Path, before: tuple[Path, ...], origin: dict[tuple[str, ...], str]) -> dict[str, Any]:
    """The keys of a file upon those of what it extends; `origin` learns which file says which."""
    if path.resolve() in before:
        circle = " -> ".join(p.name for p in (*before, path))
        raise InputError(f"{before[-1]}: extends goes in a circle, {circle}; take one of them out")
    values = _parse(path)
    if "extends" not in values:
        _note(values, str(path), origin)
        return values
    named = values.pop("extends")
    if not isinstance(named, str) or not named:
        raise InputError(f"{path}: extends must be the path of one recipe, not {named!r}")
    other = path.parent / named
    if not other.is_file():
        raise InputError(f"{path}: extends {named}, but there is no {other}")
    base = _read(other, (*before, path.resolve()), origin)
    _note(values, str(path), origin)
    return _merged(base, values)


def _parse(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{path}{line}: this is not YAML ({problem}); mend the line") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no recipe; it must be a mapping of keys to values")
    return values


def _note(values: Any, place: str, origin: dict[tuple[str, ...], str], where: tuple[str, ...] = ()) -> None:
    if where:
        origin[where] = place
    items = (
        values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    )
    for key, value in items:
        _note(value, place, origin, (*where, str(key)))


def _merged(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    merged = {key: value for key, value in base.items() if key not in over}
    for key, value in over.items():
        if value is not None:
            merged[key] = _merged(base.get(key), value)
        elif key not in base:
            merged[key] = None  # nothing to take away: the field's own null, or an unknown key to tell of
    return merged


def _put(values: Any, keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        if isinstance(values, list) and key.isdigit() and int(key) < len(values):
            values = values[int(key)]
        elif isinstance(values, dict):
            values = values.setdefault(key, {})
        else:
            raise InputError(f"--set {override}: there is no {key!r} to set something in")
    if isinstance(values, list) and keys[-1].isdigit() and int(keys[-1]) < len(values):
        values[int(keys[-1])] = value
    elif isinstance(values, dict):
        values[keys[-1]] = value
        if value is None:
            del values[keys[-1]]
    else:
        raise InputError(f"--set {override}: there is no {keys[-1]!r} to set")


def _first(error: ValidationError) -> tuple[tuple[str, ...], str]:
    """(where, what) of the problem to tell."""
    problems = error.errors()
    # `model` is a path or a mapping: what is wrong inside the mapping stands deeper than "not a path". A
    # key that is misspelt is told before the one that is missing therefore.
    about = [problem for problem in problems if problem["loc"][0] == problems[0]["loc"][0]]
    problem = max(about, key=lambda p: (p["type"] == "extra_forbidden", len(p["loc"])))
    loc = [str(part) for part in problem["loc"] if not re.match(r"NewModel$|lax-or-", str(part))]
    known = [name for model in (Recipe, NewModel, Stage, Lora, Source) for name in model.model_fields]
    if loc[-1] == "[key]":  # of stage.learn
        loc, known = loc[:-1], list(get_args(Part))
    where, key = ".".join(loc), loc[-1]
    if problem["type"] == "extra_forbidden" or "[key]" in map(str, problem["loc"]):
        near = difflib.get_close_matches(key, known, n=1)
        return tuple(loc), f"unknown key {where!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    plain = {
        "missing": "is missing",
        "path_type": "must be a path or a mapping",
        "too_short": "is empty; give one",
    }
    if problem["type"] in plain:
        return tuple(loc), f"{where} {plain[problem['type']]}"
    return tuple(loc), f"{where}: {problem['msg'].removeprefix('Value error, ')}"
