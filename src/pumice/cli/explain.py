"""`pumice explain`: show where each word of an answer looked, and whether the picture mattered."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pumice.cli import options
from pumice.errors import InputError
from pumice.files import replacing
from pumice.jsonl import json_text, print_json

SUFFIXES = (".html", ".png", ".json")


@options.expand
def explain(
    arguments: Annotated[
        list[str] | None, Argument(help="Pictures, then the question.", metavar="IMAGE... QUESTION")
    ] = None,
    out: Annotated[Path | None, Option(help="page.html, picture.png or data.json.", metavar="FILE")] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
    answer: Annotated[str | None, Option(help="Explain this answer instead of the model's own.")] = None,
    method: Annotated[
        str | None, Option(help="mean, best-layers, rollout, gradient or gradient-best-layers (the default).")
    ] = None,
    layers: Annotated[str | None, Option(help="Layers to look at, from 0: 12-23 or 3,7,21.")] = None,
    occlusion: Annotated[
        int, Option(help="Also grey so many regions on a side, one by one: slow, but causal; not in a PNG.")
    ] = 0,
    model: options.Model = "pumice-tiny",
    *,
    sampling: Annotated[options.Sampling, "max_new_tokens", "temperature", "seed"],
    opening: Annotated[options.Opening, "device", "quantize", "mmproj", "cache_limit"],
) -> None:
    """Show where each word of an answer looked, and whether the picture mattered.

    pumice explain dog.jpg "What is the dog doing?" --out page.html
    """
    *images, question = arguments or [""]
    if not question.strip():
        raise InputError(
            'there is no question; write for example: pumice explain dog.jpg "What is this?" --out page.html'
        )
    if not images:
        raise InputError(
            f"there is no picture before the question {question!r}; an explanation shows where an answer "
            "looked in one"
        )
    if out is None and not as_json:
        raise InputError("say where it goes: --out page.html, --out picture.png or --out data.json")
    suffix = "" if out is None else out.suffix.lower()
    if out is not None:
        if suffix not in SUFFIXES:
            raise InputError(f"--out '{out}' must end in .html, .png or .json")
        options.check_out(out, images, "the picture itself")
    if occlusion and suffix == ".png" and not as_json:
        raise InputError("a strip does not show --occlusion; write a page.html or a data.json")

    from pumice.explain.page import page, to_json
    from pumice.images import open_image

    layer_numbers = _parse_layers(layers)
    opened = [open_image(name) for name in images]  # before torch is imported: a wrong path fails at once
    options.share_cores()
    from pumice.explain.methods import DEFAULT, get_method
    from pumice.explain.render import strip

    get_method(method or DEFAULT)  # raises before the model is loaded
    assistant = opening.load_to_ask(model, sampling.given(), pictures=True)
    explanation = assistant.explain(
        opened, question, answer, method=method or DEFAULT, layers=layer_numbers, occlusion=occlusion,
        **sampling.given(),
    )  # fmt: skip
    if out is not None:
        with replacing(out) as file:
            if suffix == ".png":
                strip(explanation).save(file.buffer, "PNG", optimize=True)
            elif suffix == ".html":
                file.write(page(explanation))
            else:
                file.write(json_text(to_json(explanation)) + "\n")
    if as_json:
        values = {"model": assistant.name, "images": images, **to_json(explanation, pictures=False)}
        print_json({**values, "out": None if out is None else str(out)})
        return
    print(explanation.answer)
    print(explanation.reliance.verdict(), file=sys.stderr)


def _parse_layers(text: str | None) -> list[int] | None:
    """Parse "12-23", "3,7,21" or a mix of both."""
    if text is None:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        last = high if dash else low
        if not (low.isdecimal() and last.isdecimal()) or not int(low) <= int(last) <= 10_000:
            raise InputError(f"--layers is {text!r}; write numbers from 0, such as 12-23 or 3,7,21")
        numbers += range(int(low), int(last) + 1)
    return numbers
