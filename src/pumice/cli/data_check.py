"""`pumice data check`: every row and every picture, before they are learned."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from pumice.cli import options
from pumice.cli.data_show import print_row
from pumice.cli.source import SourceOptions
from pumice.errors import InputError, counted
from pumice.jsonl import print_json
from pumice.progress import ProgressBar
from pumice.threads import usable_cores

if TYPE_CHECKING:
    from pumice.conversation import Conversation
    from pumice.data.check import DataReport
    from pumice.data.rows import ImageFinder, Rows
    from pumice.processor import Processor

MAX_PRINTED = 50  # problems in the terminal, those of one kind counted once
FOLDED = 5  # rows that are named of a problem that many have


class TokenCounter:
    """Counts a row's tokens as training does: (all, supervised). It can be sent to another process."""

    def __init__(self, processor: Processor) -> None:
        from pumice.config import LARGEST
        from pumice.processor import Processor

        # With the largest context that a model may have, rows that are too long are counted as well.
        decoder = dataclasses.replace(processor.config.decoder, context=LARGEST["context"])
        self._unlimited = Processor(
            dataclasses.replace(processor.config, decoder=decoder), processor.tokenizer
        )

    def __call__(self, conversation: Conversation) -> tuple[int, int]:
        sample = self._unlimited.training_sample(conversation)
        return len(sample.input_ids), sample.supervised


@options.expand
def check(
    reading: SourceOptions,
    sources: Annotated[
        list[str] | None,
        Argument(
            help="Rows in any format: files, folders, globs, hf://owner/name; the recipe's if none is given.",
            metavar="SOURCE...",
        ),
    ] = None,
    images: Annotated[
        list[Path] | None,
        Option(help="A folder of the pictures; repeat for several. The recipe's if none is given."),
    ] = None,
    recipe: Annotated[Path | None, Option(help="Also count tokens as this recipe's stage has them.")] = None,
    held_out: Annotated[
        list[str] | None,
        Option(
            help="Rows whose pictures should not be among them; the recipe's if none is given.",
            metavar="SOURCE",
        ),
    ] = None,
    budget: Annotated[float, Option(help="The share of rows that may be unusable.")] = 0.0,
    decode: Annotated[bool, Option(help="Open every picture.")] = True,
    workers: Annotated[int | None, Option(min=0, help="Processes that open them; one per core.")] = None,
    sample: Annotated[bool, Option(help="Show a row of each source in tokens (with --recipe).")] = True,
    fixed: Annotated[Path | None, Option("--fix", help="Write a cleaned copy of SOURCE here.")] = None,
    report_to: Annotated[Path | None, Option("--report", help="Write the report here as JSON.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print the whole report as one JSON object.")] = False,
) -> None:
    """Check rows and their pictures. Status 1 when more rows than --budget are unusable."""
    from pumice.data.check import check as check_rows
    from pumice.data.fix import fix
    from pumice.data.rows import ImageFinder
    from pumice.files import replacing

    # 1. Take the sources and folders that are not given from the recipe.
    processor = loaded_recipe = None
    rows = [reading.open(source) for source in sources or ()]
    others = [reading.open(source) for source in held_out or ()]
    if recipe is not None:
        from pumice.train.batches import open_rows
        from pumice.train.recipe import load_recipe
        from pumice.train.shapes import check_base, processor_of

        loaded_recipe = load_recipe(recipe)
        check_base(loaded_recipe, recipe)
        processor = processor_of(loaded_recipe)
        rows = rows or [open_rows(source) for source in loaded_recipe.data]
        others = others or [open_rows(source) for source in loaded_recipe.held_out]
        images = images or loaded_recipe.pictures
    # 2. Check all rows.
    if not rows:
        raise InputError("there is nothing to check: give a file of rows, or --recipe")
    if fixed is not None and len(rows) != 1:
        raise InputError(f"--fix writes one cleaned file, but {len(rows)} are checked; check them in turn")
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
            encode=None if processor is None else TokenCounter(processor),
            context=None if processor is None else processor.config.decoder.context,
            truncate=loaded_recipe is not None and loaded_recipe.truncate,
            held_out=others,
            workers=usable_cores() if workers is None else workers,
            progress=lambda: count(1, total, "row"),
            decoded=lambda more, pictures: count(more, pictures, "picture"),
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
            counts = ", ".join(f"{name}: {count}" for name, count in values["fixed"].items())
            print(f"{fixed} ({counts})")
        if processor is not None and sample:
            for opened in rows:
                _print_sample(opened, finder, processor)
    if not report.ok:
        raise typer.Exit(1)


def _print_report(report: DataReport) -> None:
    from pumice.data.check import fold

    groups = fold(report.problems)
    for same in groups[:MAX_PRINTED]:
        problem = same[0]
        source = f"{problem.source}, " if len(report.sources) > 1 else ""
        if len(same) > 1:
            numbers = ", ".join(str(other.row) for other in same[:FOLDED])
            more = ", ..." if len(same) > FOLDED else ""
            print(f"{source}{len(same)} rows ({numbers}{more}): {problem.kind}, the first: {problem.reason}")
            continue
        # A malformed row has no id, and its reason names the row.
        prefix = f"{source}row {problem.row} ({problem.id}): " if problem.id else ""
        print(f"{prefix}{problem.kind}: {problem.reason}")
    if len(groups) > MAX_PRINTED:
        hidden = sum(map(len, groups[MAX_PRINTED:]))
        print(f"... and {hidden} more; --json or --report lists all")
    for name, summary in report.sources.items():
        if len(report.sources) > 1:
            usable = counted(summary.usable, "row", of=summary.rows)
            print(f"\n{name}: {usable} can be used")
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
            bar = max(5, min(40, shutil.get_terminal_size().columns - 24))  # characters of the longest bar
            for bin_name, count in tokens["histogram"].items():
                print(f"  {bin_name:>12}  {'#' * round(bar * count / max_count):<{bar}} {count}")
    print(f"{counted(report.usable, 'row', of=report.rows)} can be used")


def _print_sample(rows: Rows, finder: ImageFinder, processor: Processor) -> None:
    """Print the first usable row as the model sees it."""
    for index in range(len(rows)):
        try:
            row = rows[index]
            sample = processor.training_sample(row.conversation(finder))
        except InputError:
            continue  # the report names it
        title = f"{rows.source}, row {index + 1} ({row.id})"
        print_row(title, sample.input_ids.tolist(), sample.labels.tolist(), processor.tokenizer)
        return
