"""Command-line options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import Enum
from typing import Annotated, Any

import typer


def share_cores(*, waits_for_people: bool = False) -> None:
    """Choose whether OpenMP's threads spin or sleep while they wait. Call it before torch is imported.

    Decoding is hundreds of small matrix products per token. Spinning threads save 0.3 s per answer on an
    idle machine. Beside another busy process, such as a training run, they are very slow: a token took
    1900 instead of 50 ms. They also use the CPU while a person types. So they spin only for work without
    pauses on a mostly idle machine. If OMP_WAIT_POLICY is already set, it stays.
    """
    idle = hasattr(os, "getloadavg") and os.getloadavg()[0] < 0.5 * (os.cpu_count() or 1)
    policy = "ACTIVE" if idle and not waits_for_people else "PASSIVE"
    os.environ.setdefault("OMP_WAIT_POLICY", policy)


class Bits(str, Enum):
    """The number of bits of a decoder weight."""

    auto = "auto"
    int8 = "int8"
    int4 = "int4"
    none = "none"


def opening(
    device: str | None,
    quantize: Bits,
    template: str | None = None,
    tower: str | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """Return the options that open a model as keyword arguments of `pumice.load`."""
    bits = None if quantize is Bits.none else quantize.value
    return {"device": device, "quantize": bits, "template": template, "tower": tower, "base": base}


def sampling(
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float | None,
    stop: Sequence[str] | None,
    seed: int | None,
) -> dict[str, Any]:
    """Return the sampling options as fields of `SamplingParams`; None means as the model's folder says."""
    drawn = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    given = {name: value for name, value in drawn.items() if value is not None}
    return {"max_new_tokens": max_new_tokens, **given, "stop": tuple(stop or ()), "seed": seed}


MODELS = "as the model says"
Model = Annotated[str, typer.Option("--model", "-m", help="A built-in model, a folder or a hub name.")]
Device = Annotated[
    str | None, typer.Option(help="cuda, mps or cpu; the best one here if not given.", show_default=False)
]
Quantize = Annotated[
    Bits, typer.Option(help="Bits of the language model's weights; auto: int8 on a CPU, none elsewhere.")
]
Template = Annotated[
    str | None, typer.Option(help="The chat format, where the model does not say it.", show_default=False)
]
Tower = Annotated[
    str | None, typer.Option(help="The vision tower, where the model does not hold it.", show_default=False)
]
Base = Annotated[
    str | None,
    typer.Option(help="What the model, a LoRA or a projector, was trained on.", show_default=False),
]
MaxNewTokens = Annotated[int, typer.Option(help="The longest answer, in tokens.")]
Temperature = Annotated[
    float | None,
    typer.Option(help="0 takes the likeliest word each time; 1 draws freely.", show_default=MODELS),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Draw from the likeliest words of this probability together.", show_default=MODELS),
]
TopK = Annotated[
    int | None,
    typer.Option(help="Draw from this many likeliest words; 0 is all.", show_default=MODELS),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Draw from words at least this share as likely as the likeliest; 0 is all.", show_default=MODELS
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(help="Above 1, words already said become less likely.", show_default=MODELS),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End the answer before this text; repeat as needed.", show_default=False),
]
Seed = Annotated[
    int | None, typer.Option(help="Draw the same answer again (with a temperature).", show_default=False)
]
