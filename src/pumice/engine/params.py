"""How an answer is sampled. Without torch, so that a wrong option is refused before that is imported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pumice.config import SAMPLING_RANGES, WITHOUT_BEAMS, asked_for, check_beams
from pumice.errors import InputError, instead_of

# The lowest and the highest value of each setting, and the range in words.
_RANGES = SAMPLING_RANGES | {
    "max_new_tokens": (1, math.inf, "1 or more"),
    "min_p": (0, 1, "0 (off) to 1"),
    "frequency_penalty": (-2, 2, "-2 to 2"),
    "presence_penalty": (-2, 2, "-2 to 2"),
    "seed": (0, 2**63 - 1, "0 or more, below 2**63"),
    "logprobs": (0, math.inf, "0 or more"),
    "prompt_logprobs": (0, math.inf, "0 or more"),
}
_OPTIONAL = ("seed", "logprobs", "prompt_logprobs")  # may be None
# What says how words are drawn, and so does nothing at temperature 0; and the values that ask for nothing.
# A seed is no such option: without drawing, the answer is the same each time, as it asks.
DRAWING = {"top_p": 1, "top_k": 0, "min_p": 0}
_WHOLE = ("max_new_tokens", "top_k", "num_beams", *_OPTIONAL)


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is sampled. The defaults are greedy, and so reproducible.

    Raises InputError if a value is outside its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 takes the most likely token
    top_p: float = 1.0  # the smallest set of tokens with this probability (arXiv 1904.09751); 1 is off
    top_k: int = 0  # the k most likely tokens; 0 is off
    min_p: float = 0.0  # tokens at least this share as likely as the likeliest (arXiv 2407.01082); 0 is off
    repetition_penalty: float = 1.0  # for tokens of prompt and answer (arXiv 1909.05858); 1 is off
    # Taken from the logits of the answer's earlier tokens (OpenAI's API reference); 0 is off.
    frequency_penalty: float = 0.0  # for each time that a token occurs
    presence_penalty: float = 0.0  # once, if it occurs
    stop: tuple[str, ...] = ()  # texts; an answer ends before the first of them
    seed: int | None = None  # None gives another answer each time
    logprobs: int | None = None  # return log-probabilities of each token and of this many most likely ones
    prompt_logprobs: int | None = None  # the same of the prompt's tokens, all of which are computed then
    # Beam search: the beginnings of an answer that are kept; 1 is off. It is greedy, without penalties and
    # log-probabilities, and the answer comes as a whole.
    num_beams: int = 1
    length_penalty: float = 1.0  # power of the length that sums of log-probabilities are divided by

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name, (low, high, words) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            kind, noun = (int, "whole number") if name in _WHOLE else (int | float, "number")
            is_number = isinstance(value, kind) and not isinstance(value, bool)
            if not is_number or (name not in _WHOLE and not math.isfinite(value)):
                raise InputError(f"{name} is {value!r}; give a {noun}")
            if not low <= value <= high:
                raise InputError(f"{name} is {value}; give {words}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(f"stop is {list(self.stop)!r}; give texts that are not empty")
        check_beams(vars(self))

    @classmethod
    def options(cls, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the given options, and the defaults of others: all arguments of this class.

        A default that does not go with a given option is left out. Raises InputError if a given option is
        wrong or would do nothing.
        """
        cls.of(given)
        # 1. Beams that are given turn off defaults that draw or penalise, and such options default beams.
        others = asked_for(given, WITHOUT_BEAMS)
        dropped: set[str] = {"num_beams"} if others else set()
        if given.get("num_beams", 1) != 1:
            dropped = {*WITHOUT_BEAMS, *DRAWING}
        options = {**{name: value for name, value in defaults.items() if name not in dropped}, **given}
        # 2. Without beams, no length counts.
        if options.get("num_beams", 1) == 1:
            options.pop("length_penalty", None)
            if asked_for(given, {"length_penalty": 1}):
                remedy = "leave" if others else "give num_beams 2 or more, or leave"
                raise InputError(
                    f"length_penalty is {given['length_penalty']}, which does nothing without beams; "
                    f"{remedy} length_penalty out"
                )
        # 3. Without a temperature, nothing is drawn. Options for drawing are accepted beside a temperature of
        # 0 that is given explicitly, as clients send both.
        draws = options.get("temperature")
        if not draws and "temperature" not in given and (idle := asked_for(given, DRAWING)):
            names, do = " and ".join(idle), "does" if len(idle) == 1 else "do"
            remedy = "leave" if given.get("num_beams", 1) != 1 else "give a temperature, or leave"
            raise InputError(f"{names} {do} nothing where no word is drawn; {remedy} {names} out")
        return options

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> SamplingParams:
        """Return the parameters that these options give. Raises InputError on an unknown one."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise InputError(f"there is no sampling option {name!r}{instead_of(name, known)}")
        return cls(**options)


def check_form(given: Mapping[str, Any], form: str) -> None:
    """Raise InputError if given options ask for a search of an answer in a given form. form: it in words."""
    for name in asked_for(given, {"num_beams": 1, "length_penalty": 1}):
        raise InputError(f"{name} is {given[name]}, which does not go with {form}; give {name} 1")
