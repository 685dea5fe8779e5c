"""`pumice data check` and `pumice data show`; `data generate` and `data mix` stand in a file of their own."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pumice.cli import generate, options
from pumice.progress import StatusLine

if TYPE_CHECKING:
    from pumice.conversation import Conversation
    from pumice.data.check import DataReport, Encode
    from pumice.data.rows import ImageFinder, Rows
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
    from pumice.formats.gguf.tokenizer import read_gguf_tokenizer
    from pumice.formats.text.chat_template import describe
    from pumice.formats.text.tokenizer import read_tokenizer
    from pumice.storage.json_file import read_json
    from pumice.templates import OWN, get_template
    from pumice.tokens import Tokenizer

    files = read_tokenizer(path, read_gguf_tokenizer)
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
            text.append("[image]" if end == start + 1 else f"[image x {end - start}]", "magenta")
        elif kind[1]:
            text.append(f"[+{decode(ids[start:end])}+]", "green")
        else:
            text.append(decode(ids[start:end]), "dim")
        start = end
    Console(highlight=False, soft_wrap=True).print(text, end="\n\n")


def _processor(model: str, template: str | None) -> Processor:
    """What prepares a model's input; its weights stay unread."""
    from pumice.formats.read import read_model
    from pumice.processor import Processor
    from pumice.tokens import Tokenizer

    loaded = read_model(model)
    config = dataclasses.replace(loaded.config, template=template or loaded.config.template)
    return Processor(config, Tokenizer(loaded.tokenizer))


def _encode(processor: Processor) -> Encode:
    """Counts the tokens of a row, however long, as training would without its limit."""
    from pumice.processor import Processor

    decoder = dataclasses.replace(processor.config.decoder, context=sys.maxsize)
    endless = Processor(dataclasses.replace(processor.config, decoder=decoder), processor.tokenizer)

    def encode(conversation: Conversation) -> tuple[int, int]:
        sample = endless.training_sample(conversation)
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

    processor = told = None
    if recipe is not None:
        from pumice.train.recipe import load_recipe
        from pumice.train.shapes import processor_of

        told = load_recipe(recipe)
        processor = processor_of(told)
        files = files or [source.rows for source in told.data]
        images = images or told.pictures
    if not files:
        raise InputError("there is nothing to check: give a file of rows, or --recipe")
    if fixed is not None and len(files) != 1:
        raise InputError(f"--fix writes one cleaned file, but {len(files)} are checked; check them in turn")
    rows = [Rows(file) for file in files]
    finder = ImageFinder(images or ["."])
    total, progress = sum(map(len, rows)), _Progress()
    report = check_rows(
        rows,
        finder,
        decode=decode,
        budget=budget,
        encode=None if processor is None else _encode(processor),
        context=None if processor is None else processor.config.decoder.context,
        truncate=told is not None and told.truncate,
        workers=(os.cpu_count() or 1) if workers is None else workers,
        progress=lambda: progress(1, total, "rows"),
        decoded=lambda more, pictures: progress(more, pictures, "pictures"),
    )
    values = report.to_dict()
    if fixed is not None:
        values["fixed"] = dict(fix(rows[0], finder, report, fixed))
    if report_to is not None:
        with replacing(report_to) as file:
            json.dump(values, file, ensure_ascii=False, indent=1)
    if as_json:
        print(json.dumps(values, ensure_ascii=False))
    else:
        _print_report(report)
        if fixed is not None:
            print(f"{fixed}: " + ", ".join(f"{count} {what}" for what, count in values["fixed"].items()))
        if processor is not None and sample:
            for source in rows:
                _print_sample(source, finder, processor)
    if not report.ok:
        raise typer.Exit(1)


class _Progress:
    """A counter on stderr, where a person watches it."""

    def __init__(self) -> None:
        self.what, self.done, self.line = "", 0, StatusLine()

    def __call__(self, more: int, total: int, what: str) -> None:
        if what != self.what:
            self.what, self.done = what, 0
        before, self.done = self.done, self.done + more
        if before // 50 != self.done // 50 or self.done == total:
            self.line.show(f"{self.done} of {total} {what}")
            if self.done == total:
                self.line.end()


def _print_report(report: DataReport) -> None:
    for problem in report.problems[:SHOWN]:
        # A malformed row's reason names the row itself.
        source = f"{problem.source}, " if len(report.sources) > 1 else ""
        where = f"{source}row {problem.row} ({problem.id}): " if problem.id else ""
        print(f"{where}{problem.kind}: {problem.reason}")
    if len(report.problems) > SHOWN:
        print(f"... and {len(report.problems) - SHOWN} more; --json or --report lists all")
    for name, found in report.sources.items():
        if len(report.sources) > 1:
            print(f"\n{name}: {found.usable} of {found.rows} rows can be used")
        for kind, count in found.problems.most_common():
            print(f"{count:7} x {kind}")
        if tokens := found.to_dict()["tokens"]:
            median, high = tokens["median"], tokens["percentile_95"]
            print(
                f"tokens of a row: median {median:.0f}, 95 % up to {high:.0f}, longest {tokens['longest']}; "
                f"{tokens['supervised_share']:.0%} supervised in rows that can be used; "
                f"{tokens['too_long_share']:.1%} of the rows exceed the context"
            )
            most = max(tokens["histogram"].values())
            for bin, count in tokens["histogram"].items():
                print(f"  {bin:>12}  {'#' * round(40 * count / most):<40} {count}")
    print(f"{report.usable} of {report.rows} rows can be used")


def _print_sample(rows: Rows, finder: ImageFinder, processor: Processor) -> None:
    """The first row that can be used, as the model sees it."""
    from pumice.errors import InputError

    for index in range(len(rows)):
        try:
            row = rows[index]
            sample = processor.training_sample(row.conversation(finder))
        except InputError:
            continue  # told of above
        title = f"{rows.source}, row {index + 1} ({row.id})"
        _print_row(title, sample.input_ids.tolist(), sample.labels.tolist(), processor.tokenizer)
        return
