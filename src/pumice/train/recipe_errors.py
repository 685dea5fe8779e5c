"""Say what is wrong in a recipe: of all problems that pydantic finds, the one that helps most, in words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from pumice.errors import NEWER, InputError, near, shorten
from pumice.train.shipped import near_shipped

# What transformers' arguments and LLaVA's scripts call a key, where its spelling is no hint.
_ELSEWHERE = {
    "lr": "stage.learn", "learning_rate": "stage.learn", "num_train_epochs": "epochs", "bf16": "precision",
    "per_device_train_batch_size": "batch", "model_name_or_path": "model", "data_path": "data.0.rows",
    "image_folder": "pictures",
}  # fmt: skip


def _nearest(dotted: str, known: Sequence[str]) -> str | None:
    """Return the known key that an unknown one may mean: spelt alike, at best in the same place."""
    if dotted in _ELSEWHERE:
        return _ELSEWHERE[dotted]
    place, _, key = dotted.rpartition(".")
    leaves = {name.rpartition(".")[2] for name in known}
    if (meant := near(key, leaves)) is None:
        return None
    candidates = [name for name in known if name.rpartition(".")[2] == meant]
    # A list's entries have the same keys, whatever their number.
    same_place = [name for name in candidates if name.rpartition(".")[0] == re.sub(r"\d+", "0", place)]
    return f"{place}.{meant}".lstrip(".") if same_place else candidates[0]


def missing_base(path: Path, name: str, base: Path) -> InputError:
    """Return the error of a recipe at `path` that extends `name`, a file `base` that is not there."""
    hint = _hint(base, Path(name), near_shipped(name.removesuffix(".yaml")), but=path)
    return InputError(f"{path}: extends {name}, but there is no {base}" + (f"; {hint}" if hint else ""))


def missing_recipe(path: Path) -> InputError:
    """Return the error of a recipe that is not there."""
    last_parts = {re.split("[:/]", name)[-1]: name for name in near_shipped(path.stem)}
    last = near(path.stem, last_parts)
    hint = _hint(path, path, [last_parts[last]] if last else []) or "check the path"
    return InputError(f"cannot read the recipe {path}: there is no such file; {hint}")


def _hint(path: Path, written: Path, shipped: Sequence[str], but: Path | None = None) -> str:
    """Return what may be meant by a recipe that is not there: one beside it, or a shipped one.

    written: the path as the user wrote it. but: the recipe that extends it.
    """
    beside = {file.stem: file.name for file in sorted(path.parent.glob("*.y*ml")) if file != but}
    if alike := [beside[stem] for stem in difflib.get_close_matches(path.stem, beside)]:
        return f"did you mean {' or '.join(written.with_name(one).as_posix() for one in alike)}?"
    return f"one that Pumice brings is named {shipped[0]}" if shipped else ""


def main_problem(
    error: ValidationError,
    known_keys: Sequence[str],
    parts: Sequence[str],
    set_keys: Sequence[tuple[str, ...]],
) -> tuple[tuple[str, ...], str]:
    """Return (keys, message) of the one problem that helps the user most.

    known_keys: every key of a recipe, from its top. parts: those that a stage may name. set_keys: of the
    overrides.
    """
    problems = error.errors()
    # A misspelt key comes before the key that is missing because of it.
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    first = (unknown or problems)[0]["loc"][0]
    # `model` is a path or a mapping. A problem inside the mapping has more keys than "not a path", and says
    # more.
    same_field = [problem for problem in problems if problem["loc"][0] == first]
    problem = max(same_field, key=lambda p: (p["type"] == "extra_forbidden", len(p["loc"])))
    # pydantic adds the names of its union members to the keys; the user never wrote them.
    loc = [
        str(part)
        for part in problem["loc"]
        if not re.match(r"New(Model|Connector)$|Path$|lax-or-", str(part))
    ]
    known = known_keys
    if loc[-1] == "[key]":  # an unknown part in stage.learn
        loc, known = loc[:-1], [f"stage.learn.{part}" for part in parts]
    dotted = ".".join(loc)
    if problem["type"] in ("extra_forbidden", "unknown_part"):
        # An override may have made the unknown mapping: then its whole key is what the user wrote.
        whole = next((list(keys) for keys in set_keys if list(keys[: len(loc)]) == loc), loc)
        meant = _nearest(".".join(whole), known) or _nearest(dotted, known)
        hint = f"; did you mean {meant!r}?" if meant else NEWER
        if not meant and known is not known_keys:
            hint = f"; the parts are {', '.join(parts)}"
        return tuple(whole), f"unknown key {shorten('.'.join(whole))}{hint}"
    plain = {
        "missing": "is missing",
        "path_type": "must be a path or a mapping",
        "model_type": "must be a mapping of keys to values",
        "too_short": "is empty; give one",
    }
    if problem["type"] in plain:
        return tuple(loc), f"{dotted} {plain[problem['type']]}"
    return tuple(loc), f"{dotted}: {problem['msg'].removeprefix('Value error, ')}"
