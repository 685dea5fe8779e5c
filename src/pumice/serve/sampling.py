"""How the answers to a request are sampled: its fields as those of `SamplingParams`, and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pumice.engine.params import DRAWING, SamplingParams, check_form
from pumice.errors import InputError
from pumice.serve.errors import invalid
from pumice.serve.protocol import GenerationRequest

LEAST_TOP_P = 1e-9  # leaves the likeliest token


def sampling_of(
    request: GenerationRequest, generation: Mapping[str, Any], usual: int, longest: int
) -> dict[str, Any]:
    """Return the fields of SamplingParams that the request sets.

    generation: what the model's folder says. usual: tokens of an answer where the request has no limit.
    longest: of any answer.
    """
    asked = usual if request.limit is None else request.limit
    values: dict[str, Any] = {
        "max_new_tokens": longest if asked == -1 else min(max(asked, 1), longest),
        "temperature": request.temperature,
        "top_p": None if request.top_p is None else max(request.top_p, LEAST_TOP_P),
        "top_k": None if request.top_k is None else max(0, request.top_k),
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        "num_beams": 1 if request.use_beam_search is False else request.num_beams,
        "length_penalty": request.length_penalty,
        "seed": None if request.seed is None else request.seed % 2**63,
        "stop": request.stops,
    }
    sampling = {key: value for key, value in values.items() if value is not None}
    # Clients send how words are drawn beside a temperature of 0, too.
    own = 0 if sampling.get("num_beams", 1) > 1 else generation.get("temperature", 0)
    if not sampling.get("temperature", own):
        sampling = {key: value for key, value in sampling.items() if key not in DRAWING}
    return sampling


def check_sampling(sampling: Mapping[str, Any], generation: Mapping[str, Any], *, is_held: bool) -> None:
    """Raise ApiError that names the field of beams which does not go with others, or would do nothing.

    generation: as in `sampling_of`. is_held: whether the answer is held to a form, which no search follows.
    """
    try:
        if is_held:
            check_form(sampling, "an answer in a given form")
        SamplingParams.of(SamplingParams.options(generation, sampling))
    except InputError as error:
        field, _, _ = str(error).partition(" ")
        raise invalid(field, str(error)) from error
