"""The settings of `pumice data generate`: some are its options, and a YAML file may hold any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from typer import Option

from pumice.errors import InputError, near, shorten

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from pumice.synth.endpoint import Endpoint

T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True)
class GenerateSettings:
    """What is asked of whom. Fields with an `Option` are options of the command."""

    teacher: Annotated[
        str,
        Option(help="An OpenAI-compatible address (http://.../v1), or `local` for --model in our engine."),
    ]
    model: Annotated[str, Option("--model", "-m", help="The teacher's name, or a model folder.")]
    coco_captions: Annotated[Path | None, Option(help="COCO's captions_*.json.")] = None
    coco_instances: Annotated[Path | None, Option(help="COCO's instances_*.json.")] = None
    jsonl: Annotated[tuple[Path, ...], Option(help="Lines of {image, captions, boxes, text}.")] = ()
    images: Annotated[tuple[Path, ...], Option(help="A folder of the pictures; repeat for several.")] = ()
    kind: Annotated[
        tuple[str, ...],
        Option(
            help="conversation, detail, reasoning, short-answer, unanswerable, hard-negatives, or a file; "
            "NAME=0.3 for 30% of the pictures. All when none is given.",
        ),
    ] = ()
    limit: Annotated[int | None, Option(min=1, help="Only so many pictures.")] = None
    show: Annotated[bool, Option("--show", help="Show the teacher the picture too.")] = False
    told: Annotated[bool, Option("--told/--no-told", help="Tell the teacher the annotations.")] = True
    language: Annotated[str, Option(help="What rows must be written in; `any` for no check.")] = "en"
    parallel: Annotated[int, Option(help="Calls at once (local: answers together).")] = 16
    budget_tokens: Annotated[int | None, Option(help="Tokens, in and out, that this folder may cost.")] = None

    visual_genome: Path | None = None  # a folder with Visual Genome's JSON files
    flickr30k: Path | None = None  # its captions
    max_spoiled: int = 0  # annotations that cannot be used and are left out
    examples: int | None = None  # worked examples in a prompt; None for all
    seed: int = 0  # another one asks everything anew
    unsupported: int | None = None  # things without support that a row may name; None: as its kind says
    similar: float = 0.8  # Jaccard similarity from which a row is a near-duplicate
    options: Mapping[str, Any] = field(default_factory=dict)  # of sampling; null removes a field
    device: str | None = None  # of a local teacher
    endpoint: Mapping[str, Any] = field(default_factory=dict)  # further fields of `Endpoint`

    def make_endpoint(self) -> Endpoint:
        """Return the endpoint at the teacher's address. Raises InputError for a wrong field."""
        from pumice.synth.endpoint import Endpoint

        own = {
            "url": self.teacher, "model": self.model, "parallel": self.parallel,
            "budget_tokens": self.budget_tokens, "options": {"temperature": 0.7, **self.options},
        }  # fmt: skip
        for name in own.keys() & self.endpoint.keys():
            raise InputError(f"endpoint.{name} is no setting; write it one level up")
        return _validated(Endpoint, {**own, **self.endpoint}, "endpoint.")


def read_settings(given: Mapping[str, Any], file: Path | None, overrides: Sequence[str]) -> GenerateSettings:
    """Return the settings of a file, then of "key=value" overrides, then those `given` as options.

    Raises InputError that names the key.
    """
    from pumice.storage.yaml_file import read_yaml, set_key

    values = {} if file is None else read_yaml(file, "settings")
    for override in overrides:
        set_key(values, override)
    settings = _validated(GenerateSettings, {**values, **given})
    for name, least in (("limit", 1), ("examples", 0), ("max_spoiled", 0), ("unsupported", 0)):
        number = getattr(settings, name)
        if number is not None and number < least:
            raise InputError(f"{name} is {number}; give {least} or more")
    return settings


def _validated(kind: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Return an instance of a dataclass. Raises InputError for an unknown key or a value of a wrong type."""
    from pydantic import TypeAdapter, ValidationError

    known = [item.name for item in fields(kind)]
    for key in values:
        if key not in known:
            meant = near(str(key), known)
            hint = f"did you mean {meant!r}?" if meant else f"use {', '.join(known)}"
            raise InputError(f"the settings have an unknown key {shorten(prefix + key)}; {hint}")
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        problem = error.errors()[0]
        dotted = prefix + ".".join(map(str, problem["loc"]))
        raise InputError(f"the setting {dotted}: {problem['msg']}") from error
