"""`pumice data check` and `pumice data show`; `data generate` and `data mix` are in generate.py."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pumice.cli import generate, options
from pumice.jsonl import print_json
from pumice.progress import ProgressBar

if TYPE_CHECKING:
    from pumice.config import ModelConfig
    from pumice.conversation import Conversation
    from pumice.data.check import DataReport, Encode
    from pumice.data.rows import ImageFinder, Rows
    from pumice.processor import Processor
    from pumice.templates import Plain, Template
    from pumice.tokens import Tokenizer

app = typer.Typer(help="Make training rows, and look at them before they are learned.", no_args_is_help=True)
app.command("generate")(generate.generate)
app.command("mix")(generate.mix)

EXAMPLES, MAX_PRINTED = 3, 50  # problems in the terminal: of one reason, and in all

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
        chat_format, text_tokenizer, bos = _format(template or OWN, tokenizer)
    else:
        processor = _processor(model, template)
        chat_format, text_tokenizer = processor.template, processor.tokenizer
        bos = processor.config.bos_token_id
    finder = ImageFinder(images) if images is not None else None
    printed = []
    config = None if tokenizer is not None else processor.config
    for row in Rows(file)[:rows]:
        if finder is not None:
            conversation = row.conversation(finder)
        else:
            conversation = from_llava(row.id, row.turns, row.image).check(answered=True)
        ids, labels = encode(
            chat_format.render(conversation), text_tokenizer, [1] * len(conversation.images), bos
        )
        if as_json:
            printed.append({"id": row.id, "input_ids": ids, "labels": labels})
        else:
            _print_row(row.id, ids, labels, text_tokenizer, _counted(ids, config))
    if as_json:
        print_json(printed)


def _format(template: str, path: Path) -> tuple[Template | Plain, Tokenizer, int | None]:
    """Return the template, the tokenizer and the id of the token that begins a row, if there is one."""
    from pumice.config import ModelConfig
    from pumice.errors import InputError
    from pumice.formats.gguf.tokenizer import read_gguf_tokenizer
    from pumice.formats.text.isolated import describe
    from pumice.formats.text.tokenizer import read_tokenizer
    from pumice.storage.json_file import read_json
    from pumice.templates import OWN, get_template
    from pumice.tokens import Tokenizer

    files = read_tokenizer(path, read_gguf_tokenizer)
    text_tokenizer, bos = Tokenizer(files.backend), files.bos_id
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if "pumice_format" in config:  # a Pumice model folder
        model = ModelConfig.from_dict(config)
        chat_format = get_template(model.template if template == OWN else template, model.chat)
        bos = model.bos_token_id
    elif template != OWN:
        chat_format = get_template(template)
    elif files.chat_template is None:
        raise InputError(f"{path} describes no chat format; name one with --template")
    else:
        description = describe(
            files.chat_template,
            bos=files.bos,
            eos=files.eos,
            specials=text_tokenizer.special,
            label=str(path),
        )
        chat_format = get_template(description.template, description.chat)
        if description.writes_bos and files.bos is not None:
            bos = text_tokenizer.id_of(files.bos)
    # Raises InputError if the tokenizer lacks special tokens of the template.
    text_tokenizer.stops(chat_format)
    return chat_format, text_tokenizer, bos


def _counted(ids: list[int], config: ModelConfig | None) -> str:
    """Say how many tokens a row has in the model, where `ids` holds one placeholder for each picture."""
    from pumice.config import IMAGE_TOKEN

    if not (pictures := ids.count(IMAGE_TOKEN)):
        return ""
    if config is None:
        return " (a picture counts as one; `data check` counts its image tokens)"
    tiles = config.image.uses_tiles(pictures)  # whose number depends on the picture
    whole = len(ids) + pictures * (config.image_tokens - 1)
    return (
        f" (a picture counts as one; {'at least ' * tiles}{whole} with its image tokens, as in `data check`)"
    )


def _print_row(
    row_id: str, ids: list[int], labels: list[int], tokenizer: Tokenizer, counted: str = ""
) -> None:
    """Print the tokens of a row as text: supervised ones green, pictures magenta, the others dim.

    counted: how the pictures are counted.
    """
    from rich.console import Console
    from rich.text import Text

    from pumice.config import IMAGE_TOKEN
    from pumice.tokens import IGNORE

    def decode(token_ids: list[int]) -> str:
        return tokenizer.backend.decode(token_ids, skip_special_tokens=False)

    supervised = sum(label != IGNORE for label in labels)
    text = Text(f"{row_id}: {len(ids)} tokens{counted}, {supervised} supervised\n", "bold")
    start = 0
    while start < len(ids):
        # A span is a run of tokens with the same colour.
        kind = (ids[start] == IMAGE_TOKEN, labels[start] != IGNORE)
        end = start + 1
        while end < len(ids) and (ids[end] == IMAGE_TOKEN, labels[end] != IGNORE) == kind:
            end += 1
        if kind[0]:
            text.append("[image]" if end == start + 1 else f"[image x {end - start}]", "magenta")
        elif kind[1]:
            text.append(f"[+{decode(ids[start:end])}+]", "green")
        else:
            text.append(decode(ids[start:end]), "dim")
        start = end
    Console(highlight=False, soft_wrap=True).print(text, end="\n\n")


def _processor(model: str, template: str | None) -> Processor:
    """Return the processor of a model without reading its weights."""
    from pumice.formats.read import read_model
    from pumice.processor import Processor
    from pumice.tokens import Tokenizer

    loaded = read_model(model)
    config = dataclasses.replace(loaded.config, template=template or loaded.config.template)
    return Processor(config, Tokenizer(loaded.tokenizer))


def _encode(processor: Processor) -> Encode:
    """Return a function that counts a row's tokens as training does: (all, supervised)."""
    from pumice.config import LARGEST
    from pumice.processor import Processor

    # With the largest context that a model may have, rows that are too long are counted as well.
    decoder = dataclasses.replace(processor.config.decoder, context=LARGEST["context"])
    unlimited = Processor(dataclasses.replace(processor.config, decoder=decoder), processor.tokenizer)

    def encode(conversation: Conversation) -> tuple[int, int]:
        sample = unlimited.training_sample(conversation)
        return len(sample.input_ids), sample.supervised

    return encode


@app.command()
def check(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="LLaVA rows, .json or .jsonl; the recipe's if none is given.", metavar="FILE..."),
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="A folder of the pictures; repeat for several. The recipe's if none is given."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Also count tokens as this recipe's stage has them.", show_default=False),
    ] = None,
    budget: Annotated[float, typer.Option(help="The share of rows that may be unusable.")] = 0.0,
    decode: Annotated[bool, typer.Option(help="Open every picture.")] = True,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that open them; one per core.", show_default=False)
    ] = None,
    sample: Annotated[bool, typer.Option(help="Show a row of each file in tokens (with --recipe).")] = True,
    fixed: Annotated[
        Path | None, typer.Option("--fix", help="Write a cleaned copy of FILE here.", show_default=False)
    ] = None,
    report_to: Annotated[
        Path | None, typer.Option("--report", help="Write the report here as JSON.", show_default=False)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole report as one JSON object.")
    ] = False,
) -> None:
    """Check rows and their pictures. Status 1 when more rows than --budget are unusable."""
    from pumice.data.check import check as check_rows
    from pumice.data.fix import fix
    from pumice.data.rows import ImageFinder, Rows
    from pumice.errors import InputError
    from pumice.files import replacing

    # 1. Take the files and folders that are not given from the recipe.
    processor = loaded_recipe = None
    if recipe is not None:
        from pumice.train.recipe import load_recipe
        from pumice.train.shapes import processor_of

        loaded_recipe = load_recipe(recipe)
        processor = processor_of(loaded_recipe)
        files = files or [source.rows for source in loaded_recipe.data]
        images = images or loaded_recipe.pictures
    # 2. Check all rows.
    if not files:
        raise InputError("there is nothing to check: give a file of rows, or --recipe")
    if fixed is not None and len(files) != 1:
        raise InputError(f"--fix writes one cleaned file, but {len(files)} are checked; check them in turn")
    rows = [Rows(file) for file in files]
    finder = ImageFinder(images or ["."])
    total, done = sum(map(len, rows)), Counter[str]()
    with ProgressBar() as bar:

        def count(more: int, total: int, unit: str) -> None:
            done[unit] += more
            bar.show(done[unit], total, unit)

        report = check_rows(
            rows,
            finder,
            decode=decode,
            budget=budget,
            encode=None if processor is None else _encode(processor),
            context=None if processor is None else processor.config.decoder.context,
            truncate=loaded_recipe is not None and loaded_recipe.truncate,
            workers=(os.cpu_count() or 1) if workers is None else workers,
            progress=lambda: count(1, total, "rows"),
            decoded=lambda more, pictures: count(more, pictures, "pictures"),
        )
    # 3. Write the cleaned copy and the report.
    values = report.to_dict()
    if fixed is not None:
        values["fixed"] = dict(fix(rows[0], finder, report, fixed))
    if report_to is not None:
        with replacing(report_to) as file:
            json.dump(values, file, ensure_ascii=False, indent=1)
    if as_json:
        print_json(values)
    else:
        _print_report(report)
        if fixed is not None:
            print(f"{fixed}: " + ", ".join(f"{count} {name}" for name, count in values["fixed"].items()))
        if processor is not None and sample:
            for source in rows:
                _print_sample(source, finder, processor)
    if not report.ok:
        raise typer.Exit(1)


def _print_report(report: DataReport) -> None:
    # Rows with one reason are folded: it is the same apart from names and numbers.
    printed, reasons = 0, Counter[tuple[str, str, str]]()
    for problem in report.problems:
        reason = (problem.source, problem.kind, re.sub(r"'[^']*'|\d+", "", problem.reason))
        reasons[reason] += 1
        if reasons[reason] > EXAMPLES or printed == MAX_PRINTED:
            continue
        # A malformed row has no id, and its reason names the row.
        source = f"{problem.source}, " if len(report.sources) > 1 else ""
        prefix = f"{source}row {problem.row} ({problem.id}): " if problem.id else ""
        print(f"{prefix}{problem.kind}: {problem.reason}")
        printed += 1
    if more := len(report.problems) - printed:
        print(f"... and {more} more like these; --json or --report lists all")
    for name, summary in report.sources.items():
        if len(report.sources) > 1:
            print(f"\n{name}: {summary.usable} of {summary.rows} rows can be used")
        for kind, count in summary.problems.most_common():
            print(f"{count:7} x {kind}")
        if tokens := summary.to_dict()["tokens"]:
            median, high = tokens["median"], tokens["percentile_95"]
            print(
                f"tokens of a row, with its pictures' image tokens: median {median:.0f}, "
                f"95 % up to {high:.0f}, longest {tokens['longest']}; "
                f"{tokens['supervised_share']:.0%} supervised in rows that can be used; "
                f"{tokens['too_long_share']:.1%} of the rows exceed the context"
            )
            max_count = max(tokens["histogram"].values())
            for bin_name, count in tokens["histogram"].items():
                print(f"  {bin_name:>12}  {'#' * round(40 * count / max_count):<40} {count}")
    print(f"{report.usable} of {report.rows} rows can be used")


def _print_sample(rows: Rows, finder: ImageFinder, processor: Processor) -> None:
    """Print the first usable row as the model sees it."""
    from pumice.errors import InputError

    for index in range(len(rows)):
        try:
            row = rows[index]
            sample = processor.training_sample(row.conversation(finder))
        except InputError:
            continue  # the report names it
        title = f"{rows.source}, row {index + 1} ({row.id})"
        _print_row(title, sample.input_ids.tolist(), sample.labels.tolist(), processor.tokenizer)
        return
