"""`pumice data check` and `pumice data show`; `data generate` and `data mix` stand in a file of their own."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pumice.cli import generate, options

if TYPE_CHECKING:
    from pumice.conversation import Conversation
    from pumice.data.check import Encode
    from pumice.processor import Processor
    from pumice.templates import Plain, Template
    from pumice.tokens import Tokenizer

app = typer.Typer(help="Make training rows, and look at them before they are learned.", no_args_is_help=True)
app.command("generate")(generate.generate)
app.command("mix")(generate.mix)

SHOWN = 50  # problems in the terminal

File = Annotated[Path, typer.Argument(help="LLaVA rows, .json or .jsonl.", metavar="FILE")]


@app.command()
def show(
    file: File,
    model: options.Model = "pumice-tiny",
    template: Annotated[
        str | None,
        typer.Option(help="Another chat format than the model's: v1, plain, ...", show_default=False),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Not a model's but this tokenizer.json, SentencePiece tokenizer.model, folder or GGUF file.",
            metavar="PATH",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Look the pictures up here; without it none is needed.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Show only so many rows.", show_default=False)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a list of {id, input_ids, labels}; a picture is -200.")
    ] = False,
) -> None:
    """Print rows as the model sees them: what it learns to write is green and in [+ +]."""
    from pumice.conversation import from_llava
    from pumice.data.rows import ImageFinder, Rows
    from pumice.templates import OWN
    from pumice.tokens import encode

    if tokenizer is not None:
        written, words, bos = _format(template or OWN, tokenizer)
    else:
        processor = _processor(model, template)
        written, words, bos = processor.template, processor.tokenizer, processor.config.bos_token_id
    finder = ImageFinder(images) if images is not None else None
    shown = []
    for row in Rows(file)[:rows]:
        if finder is not None:
            conversation = row.conversation(finder)
        else:
            conversation = from_llava(row.id, row.turns, row.image).check(answered=True)
        ids, labels = encode(written.render(conversation), words, [1] * len(conversation.images), bos)
        if as_json:
            shown.append({"id": row.id, "input_ids": ids, "labels": labels})
        else:
            _print_row(row.id, ids, labels, words)
    if as_json:
        print(json.dumps(shown))


def _format(template: str, path: Path) -> tuple[Template | Plain, Tokenizer, int | None]:
    """How text becomes tokens: the template, the tokenizer, and what stands before everything."""
    from pumice.config import ModelConfig
    from pumice.errors import InputError
    from pumice.templates import OWN, get_template
    from pumice.tokens import Tokenizer
    from pumice.weights.chat_template import describe
    from pumice.weights.jsonfile import read_json
    from pumice.weights.tokenizer import read_tokenizer

    files = read_tokenizer(path)
    words, bos = Tokenizer(files.backend), files.bos_id
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if "pumice_format" in config:  # one of our models
        model = ModelConfig.from_dict(config)
        written = get_template(model.template if template == OWN else template, model.chat)
        bos = model.bos_token_id
    elif template != OWN:
        written = get_template(template)
    elif files.chat_template is None:
        raise InputError(f"{path} describes no chat format of its own; name one with --template")
    else:
        found = describe(
            files.chat_template, bos=files.bos, eos=files.eos, specials=words.special, where=str(path)
        )
        written = get_template(found.template, found.chat)
        if found.writes_bos and files.bos is not None:
            bos = words.id_of(files.bos)
    words.stops(written)  # refuses a template whose special tokens the tokenizer lacks
    return written, words, bos


def _print_row(row_id: str, ids: list[int], labels: list[int], tokenizer: Tokenizer) -> None:
    from rich.console import Console
    from rich.text import Text

    from pumice.config import IMAGE_TOKEN
    from pumice.tokens import IGNORE

    def decode(numbers: list[int]) -> str:
        return tokenizer.backend.decode(numbers, skip_special_tokens=False)

    learned = sum(label != IGNORE for label in labels)
    text = Text(f"{row_id}: {len(ids)} tokens, {learned} supervised\n", "bold")
    start = 0
    while start < len(ids):
        kind = (ids[start] == IMAGE_TOKEN, labels[start] != IGNORE)
        end = start + 1
        while end < len(ids) and (ids[end] == IMAGE_TOKEN, labels[end] != IGNORE) == kind:
            end += 1
        if kind[0]:
            text.append("[image]" * (end - start), "magenta")
        elif kind[1]:
            text.append(f"[+{decode(ids[start:end])}+]", "green")
        else:
            text.append(decode(ids[start:end]), "dim")
        start = end
    Console(highlight=False, soft_wrap=True).print(text, end="\n\n")


def _processor(model: str, template: str | None) -> Processor:
    """What prepares a model's input; its weights stay unread."""
    from pumice.processor import Processor
    from pumice.tokens import Tokenizer
    from pumice.weights.read import read_model

    loaded = read_model(model)
    config = dataclasses.replace(loaded.config, template=template or loaded.config.template)
    return Processor(config, Tokenizer(loaded.tokenizer))


def _lengths(path: Path) -> Encode:
    """Counts the tokens of a row as training by the recipe would."""
    from pumice.train.recipe import NewModel, load_recipe
    from pumice.train.setup import prepare

    recipe = load_recipe(path)
    if isinstance(recipe.model, NewModel):
        processor = prepare(recipe).processor
    else:
        processor = _processor(str(recipe.model), recipe.stage.template)

    def encode(conversation: Conversation) -> tuple[int, int]:
        sample = processor.training_sample(conversation)
        return len(sample.input_ids), sample.supervised

    return encode


@app.command()
def check(
    file: File,
    images: Annotated[list[Path], typer.Option(help="A folder of the pictures; repeat for several.")],
    recipe: Annotated[
        Path | None,
        typer.Option(help="Also measure lengths as this recipe's stage has them.", show_default=False),
    ] = None,
    budget: Annotated[float, typer.Option(help="The share of rows that may be unusable.")] = 0.0,
    decode: Annotated[bool, typer.Option(help="Open every picture.")] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole report as one JSON object.")
    ] = False,
) -> None:
    """Check rows and their pictures. Status 1 when more rows than --budget are unusable."""
    from pumice.data.check import check as check_rows
    from pumice.data.rows import ImageFinder, Rows

    rows = Rows(file)
    encode = None if recipe is None else _lengths(recipe)
    watched = sys.stderr.isatty()
    done = 0

    def progress() -> None:
        nonlocal done
        done += 1
        if watched and (done % 50 == 0 or done == len(rows)):
            print(
                f"\r{done} of {len(rows)} rows",
                end="\n" if done == len(rows) else "",
                file=sys.stderr,
                flush=True,
            )

    report = check_rows(
        [rows],
        ImageFinder(images),
        decode=decode,
        budget=budget,
        encode=encode,
        progress=progress,
    )
    values = report.to_dict()
    if as_json:
        print(json.dumps(values, ensure_ascii=False))
    else:
        for problem in report.problems[:SHOWN]:
            # A malformed row's reason names the row itself.
            where = f"row {problem.row} ({problem.id}): " if problem.id else ""
            print(f"{where}{problem.kind}: {problem.reason}")
        if len(report.problems) > SHOWN:
            print(f"... and {len(report.problems) - SHOWN} more; --json lists all")
        for source in report.sources.values():
            for kind, count in source.problems.most_common():
                print(f"{count:7} x {kind}")
            if tokens := source.to_dict()["tokens"]:
                median, high = tokens["median"], tokens["percentile_95"]
                print(
                    f"tokens of a row: median {median:.0f}, 95 % up to {high:.0f}, "
                    f"longest {tokens['longest']}; {tokens['supervised_share']:.0%} of them supervised"
                )
        print(f"{report.usable} of {report.rows} rows can be used")
    if not report.ok:
        raise typer.Exit(1)
