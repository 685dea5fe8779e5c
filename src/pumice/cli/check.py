"""`pumice check`: does another form of a model compute the same, and if not, where do they part?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from pumice.cli import options
from pumice.errors import InputError
from pumice.jsonl import print_json

if TYPE_CHECKING:
    from pumice.evaluate.parity import CheckQuestion, CheckStage, InPumice, Program

_EXACT = options.Opening(quantize="none")  # so that rounding does not hide what went wrong
QUESTION = "What is in the picture?"
# What to look at where two programs part.
_HINTS = {
    "tokenizer": "the same text becomes other tokens: compare the tokenizers' files, and the chat templates",
    "image tokens": "a picture becomes another number of tokens: compare tiles, crop and padding",
    "tower": "a picture is prepared or encoded otherwise: compare its resizing, the feature layer, the class "
    "token, and the weights of tower and connector",
    "decoder": "the language model computes otherwise: compare its weights, their types, rotary positions",
    "prompt": "the prompts differ in length: compare chat template, tokenizer and image tokens",
    "answer": "no single stage explains it: differences that each stay within the bounds add up",
}

# Whose rounding can make two programs part there: the beginnings of the weights' names.
_ROUNDED = {"tower": ("tower.", "connector."), "decoder": ("decoder.",), "answer": ("",)}


@options.expand
def check(
    model: Annotated[str, Argument(help="A folder, GGUF files, or a hub name.", metavar="MODEL")],
    images: Annotated[
        list[Path] | None,
        Argument(
            help="Pictures to ask about; a drawn one of the tower's size if there are none.",
            metavar="[IMAGE]...",
        ),
    ] = None,
    *,
    against: Annotated[
        str, Option(help="The other form: a folder, GGUF files, or http://HOST/v1.", metavar="OTHER")
    ],
    against_mmproj: Annotated[str | None, Option(help="OTHER's half that sees, in GGUF.")] = None,
    llama_cpp: Annotated[
        bool, Option("--llama-cpp", help="Run OTHER, in GGUF, by llama.cpp instead of Pumice.")
    ] = False,
    model_name: Annotated[
        str | None, Option(help="OTHER's name at its address, where there are several.")
    ] = None,
    questions: Annotated[
        list[str] | None, Option("--question", help="What is asked; repeat.", show_default=QUESTION)
    ] = None,
    new_tokens: Annotated[int, Option(min=1, help="Tokens of an answer.")] = 16,
    tolerance: Annotated[float, Option(min=0, help="By how much log-probabilities may differ.")] = 0.1,
    opening: Annotated[
        options.Opening, "device", "quantize", "template", "tower", "base", "mmproj", "cache_limit"
    ] = _EXACT,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Ask two forms of one model the same, and say where they part: did my conversion break it?

    pumice check llava --against llava-gguf --llama-cpp

    Status 1 if they part.
    """
    served = against.startswith(("http://", "https://"))
    if served and llama_cpp:
        raise InputError(f"--llama-cpp opens GGUF files, not an address such as {against}; leave one out")
    if missing := [path for path in images or () if not path.is_file()]:
        raise InputError(f"there is no picture {missing[0]}; check the path")
    options.share_cores()
    from pumice.evaluate.parity import first_parting

    first, second = _programs(
        model, against, opening, against_mmproj, llama_cpp, model_name, new_tokens, served
    )
    asked = _questions(first, images or [], questions or [QUESTION])
    results = _run(first, second, asked, tolerance)
    parting = first_parting([stage for stages in results for stage in stages])
    hint = None if parting is None else _HINTS[parting]
    # With --quantize, both are rounded alike.
    if parting in _ROUNDED and not served and opening.quantize == "none":
        rounded = _rounded(parting, model, against, opening, against_mmproj)
        if rounded:
            hint = f"{rounded}, so rounding alone may be the difference; if it is not, {hint}"
    if as_json:
        rows = [
            {
                "question": question.text,
                "pictures": len(question.pictures),
                "stages": [vars(s) for s in stages],
            }
            for question, stages in zip(asked, results, strict=True)
        ]
        print_json({"model": model, "against": against, "parts": parting, "hint": hint, "questions": rows})
    else:
        _print(asked, results)
        print("They compute the same." if parting is None else f"They part first at {parting}: {hint}.")
    if parting is not None:
        raise typer.Exit(1)


def _programs(
    model: str, against: str, opening: options.Opening, mmproj: str | None, llama_cpp: bool, name: str | None,
    new_tokens: int, served: bool,
) -> tuple[InPumice, Program]:  # fmt: skip
    """Return both programs."""
    from pumice.assistant import load
    from pumice.evaluate.parity import AtAddress, InLlamaCpp, InPumice

    # Each opens its model when it is asked first, so that not both are in memory at once.
    arguments = opening.arguments()
    shared = {key: arguments[key] for key in ("device", "quantize", "cache_limit")}
    first = InPumice(model, lambda: load(model, **arguments), new_tokens)
    if served:
        return first, AtAddress(against, name, new_tokens)
    if not llama_cpp:
        return first, InPumice(against, lambda: load(against, mmproj=mmproj, **shared), new_tokens)
    from pumice.formats.gguf.read import gguf_files
    from pumice.formats.read import find_pair, read_model
    from pumice.processor import Processor
    from pumice.tokens import Tokenizer

    llm, seeing = gguf_files(*find_pair(against, mmproj))
    parts = read_model(against, mmproj=mmproj)
    processor = Processor(parts.config, Tokenizer(parts.tokenizer))
    return first, InLlamaCpp(against, llm.path, None if seeing is None else seeing.path, processor)


def _rounded(parting: str, model: str, against: str, opening: options.Opening, mmproj: str | None) -> str:
    """Say how the weights of a stage are quantised in each file; "" if alike, or of another shape."""
    from pumice.formats.quantize import stored_bits
    from pumice.formats.read import read_model

    arguments = opening.arguments()
    named = {key: arguments[key] for key in ("template", "tower", "base", "mmproj")}
    sides = read_model(model, **named), read_model(against, mmproj=mmproj)
    shapes, kinds = [], []
    for parts in sides:
        computing = {n: t for n, t in parts.state.items() if n.startswith(_ROUNDED[parting])}
        shapes.append((parts.config.decoder.width, parts.config.decoder.vocab_size))
        kinds.append(stored_bits(computing))
    if kinds[0] == kinds[1] or shapes[0] != shapes[1]:
        return ""
    return " and ".join(
        f"{name} is quantised to {kind}" if kind else f"{name} is not quantised"
        for name, kind in zip((model, against), kinds, strict=True)
    )


def _questions(first: InPumice, images: Sequence[Path], texts: Sequence[str]) -> list[CheckQuestion]:
    """Return each text without a picture, and about each picture."""
    from pumice.evaluate.parity import CheckQuestion, drawn_picture

    vision = first.assistant.model.config.vision
    if vision.kind == "none":
        if images:
            raise InputError(f"{first.name} sees no pictures; leave {images[0]} out, or give its mmproj")
        return [CheckQuestion(text) for text in texts]
    pictures: list[Any] = list(images) or [drawn_picture(vision.image_size)]
    return [
        *(CheckQuestion(text) for text in texts),
        *(CheckQuestion(text, (picture,)) for picture in pictures for text in texts),
    ]


def _run(
    first: InPumice, second: Program, asked: Sequence[CheckQuestion], tolerance: float
) -> list[list[CheckStage]]:
    from pumice.evaluate.parity import compare

    traces = [first.trace(question, None) for question in asked]
    words = {number: first.word(number) for trace in traces for number in trace.written}
    first.close()
    others = [second.trace(question, trace) for question, trace in zip(asked, traces, strict=True)]
    second.close()
    return [compare(a, b, tolerance, words.__getitem__) for a, b in zip(traces, others, strict=True)]


def _print(asked: Sequence[CheckQuestion], results: Sequence[Sequence[CheckStage]]) -> None:
    marks = {True: "equal", False: "DIFFERENT", None: "unknown"}
    for question, stages in zip(asked, results, strict=True):
        about = " (a picture)" if question.pictures else " (no picture)"
        print(f"{question.text}{about}")
        for stage in stages:
            print(f"  {stage.name:<14}{marks[stage.same]:<11}{stage.says}")
