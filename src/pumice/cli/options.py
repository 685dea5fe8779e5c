"""Options that several commands share, and how a settings class becomes options."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import GenericAlias
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer import Option

from pumice.errors import InputError
from pumice.threads import busy_load, usable_cores

if TYPE_CHECKING:
    from pumice.assistant import Assistant


def expand(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of its parameters that are dataclasses.

    The name, type, default and sentence of such an option stand in the dataclass alone: its fields are
    annotated with `typer.Option`, and those without it are no options. `Annotated[Sampling, "seed"]` takes
    only the fields that it names. A default of the parameter replaces those of the class.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, list[inspect.Parameter]]] = {}
    for parameter in inspect.signature(function).parameters.values():
        kind, *only = _split(hints[parameter.name])
        if is_dataclass(kind):
            instance = None if parameter.default is parameter.empty else parameter.default
            options = [p for p in _fields(kind, instance) if not only or p.name in only]
            groups[parameter.name] = (kind, options)
            parameters += options
        else:
            parameters.append(
                parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
            )

    @functools.wraps(function)
    def command(**given: Any) -> None:
        for name, (kind, options) in groups.items():
            values = {option.name: given.pop(option.name) for option in options}
            given[name] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        function(**given)

    command.__dict__["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _fields(kind: Any, instance: Any) -> list[inspect.Parameter]:
    """Return a parameter for each field that is an option. instance: has the defaults, if it is not None."""
    hints = get_type_hints(kind, include_extras=True)
    parameters = []
    for field in fields(kind):
        base, *details = _split(hints[field.name])
        if not details:
            continue
        default: Any = inspect.Parameter.empty if field.default is MISSING else field.default
        default = default if instance is None else getattr(instance, field.name)
        form: Any = Annotated  # whose arguments are known only here
        if get_origin(base) is tuple:  # typer would read so many words for one option
            base, default = GenericAlias(list, get_args(base)[:1]), [*default]
        annotation = form[(base, *details)]
        parameters.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )
        )
    return parameters


def _split(hint: Any) -> tuple[Any, ...]:
    """Return the type of a hint, and what `Annotated` adds to it."""
    return (hint.__origin__, *hint.__metadata__) if get_origin(hint) is Annotated else (hint,)


def given(context: typer.Context, settings: Any) -> dict[str, Any]:
    """Return the fields of settings that stand on the command line, where they replace those of a file."""
    sources = {name: context.get_parameter_source(name) for name in vars(settings)}
    words = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    return {name: getattr(settings, name) for name in words}


def check_out(out: Path, inputs: Iterable[str | Path], what: str) -> None:
    """Raise InputError unless --out can be written and is none of the inputs. what: those in words."""
    if not out.absolute().parent.is_dir():
        raise InputError(f"the folder '{out.parent}' of --out does not exist; make it first")
    if out.is_dir() or (out.exists() and any(Path(path).exists() and out.samefile(path) for path in inputs)):
        raise InputError(f"--out '{out}' is a folder or {what}; name another file")


def share_cores(*, waits_for_people: bool = False) -> None:
    """Choose whether OpenMP's threads spin or sleep while they wait. Call it before torch is imported.

    Decoding is hundreds of small matrix products per token. Spinning threads save 0.3 s per answer on an
    idle machine. Beside another busy process, such as a training run, they are very slow: a token took
    1900 instead of 50 ms. They also use the CPU while a person types. So they spin only for work without
    pauses on a mostly idle machine. If OMP_WAIT_POLICY is already set, it stays.
    """
    idle = hasattr(os, "getloadavg") and busy_load() < 0.5 * usable_cores()
    policy = "ACTIVE" if idle and not waits_for_people else "PASSIVE"
    os.environ.setdefault("OMP_WAIT_POLICY", policy)


Model = Annotated[str, Option("--model", "-m", help="A built-in model, a folder or a hub name.")]
VideoFrames = Annotated[
    int | None,
    Option("--frames", min=1, help="Frames of a video or an animation; by default as the model was trained."),
]
Device = Annotated[str | None, Option(help="cuda, mps or cpu; the best one here if not given.")]
Template = Annotated[str | None, Option(help="The chat format, where the model does not say it.")]
Tower = Annotated[str | None, Option(help="The vision tower, where the model does not hold it.")]
Base = Annotated[str | None, Option(help="What the model, a LoRA or a projector, was trained on.")]
Mmproj = Annotated[str | None, Option(help="The half of a LLaVA in GGUF that sees, where it lies elsewhere.")]


@dataclass(frozen=True)
class Opening:
    """How a model is opened: arguments of `pumice.load`."""

    device: Device = None
    quantize: Annotated[
        Literal["auto", "int8", "int4", "none"],
        Option(help="Bits of the language model's weights; auto: int8 on a CPU, none elsewhere."),
    ] = "auto"
    template: Template = None
    tower: Tower = None
    base: Base = None
    mmproj: Mmproj = None
    cache_limit: Annotated[
        float | None,
        Option(
            min=0,
            help="GB that converted GGUF files may take in the cache; 0 keeps none.",
            show_default="$PUMICE_CACHE_LIMIT, else 20",
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        return {**vars(self), "quantize": None if self.quantize == "none" else self.quantize}

    def load(self, model: str, **sizes: Any) -> Assistant:
        """Open the model. sizes: those of its engine."""
        from pumice.assistant import load

        return load(model, **self.arguments(), **sizes)

    def load_to_ask(
        self,
        model: str,
        sampling: dict[str, Any],
        *,
        pictures: bool = False,
        shown: bool = False,
        waits_for_people: bool = False,
    ) -> Assistant:
        """Open the model that is asked, once `sampling` is known to be right.

        pictures: it is asked about some; one that sees none is refused before its weights are converted.
        shown: people see how much of a prompt is read. waits_for_people: as in `share_cores`.
        """
        from pumice.engine.params import SamplingParams

        SamplingParams.of(sampling)
        share_cores(waits_for_people=waits_for_people)
        from pumice.assistant import CHUNK_SHOWN
        from pumice.formats.read import check_sees, stored_generation

        generation = stored_generation(model)
        if generation is not None:
            SamplingParams.options(generation, sampling)
        if pictures:
            check_sees(model, self.mmproj)
        assistant = self.load(model, **({"chunk": CHUNK_SHOWN} if shown else {}))
        if generation is None:
            SamplingParams.options(assistant.generation, sampling)
        return assistant


MODELS = "as the model says"


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn: fields of `SamplingParams`. None means as the model's folder says."""

    max_new_tokens: Annotated[int, Option(help="The longest answer, in tokens.")] = 256
    temperature: Annotated[
        float | None,
        Option(help="0 takes the likeliest word each time; 1 draws freely.", show_default=MODELS),
    ] = None
    top_p: Annotated[
        float | None,
        Option(help="Draw from the likeliest words of this probability together.", show_default=MODELS),
    ] = None
    top_k: Annotated[
        int | None, Option(help="Draw from this many likeliest words; 0 is all.", show_default=MODELS)
    ] = None
    min_p: Annotated[
        float | None,
        Option(
            help="Draw from words at least this share as likely as the likeliest; 0 is all.",
            show_default=MODELS,
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None, Option(help="Above 1, words already said become less likely.", show_default=MODELS)
    ] = None
    num_beams: Annotated[
        int | None,
        Option(help="Keep this many beginnings and take the best answer, as a whole.", show_default=MODELS),
    ] = None
    length_penalty: Annotated[
        float | None,
        Option(help="With beams: above 0, longer answers become more likely.", show_default=MODELS),
    ] = None
    stop: Annotated[tuple[str, ...], Option(help="End the answer before this text; repeat as needed.")] = ()
    seed: Annotated[int | None, Option(help="Draw the same answer again (with a temperature).")] = None

    def given(self) -> dict[str, Any]:
        """Return the fields that do not come from the model's folder."""
        return {name: value for name, value in vars(self).items() if value is not None or name == "seed"}
