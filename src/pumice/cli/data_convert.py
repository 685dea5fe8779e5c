"""`pumice data convert`: rows of any format as LLaVA JSON Lines, parquet or WebDataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from pumice.cli import options
from pumice.cli.source import Source, SourceOptions
from pumice.progress import ProgressBar


@options.expand
def convert(
    source: Source,
    out: Annotated[Path, Argument(help="A new folder.", metavar="DST")],
    reading: SourceOptions,
    to: Annotated[
        Literal["llava", "parquet", "webdataset"],
        Option(help="LLaVA JSON Lines with a folder of pictures, or shards."),
    ] = "llava",
    images: Annotated[list[Path] | None, Option(help="A folder of the pictures; repeat for several.")] = None,
    rows_per_file: Annotated[int, Option(min=1, help="Rows of a shard.")] = 1000,
    max_bad_rows: Annotated[int, Option(min=0, help="Rows to leave out before it is refused.")] = 0,
) -> None:
    """Write rows in another format. The source stays; the same command continues where it was interrupted."""
    from pumice.data.convert import convert as convert_rows
    from pumice.data.rows import ImageFinder

    rows = reading.open(source)
    with ProgressBar(log_seconds=30) as bar:
        counts = convert_rows(
            rows,
            out,
            to,
            ImageFinder(images or ["."]),
            rows_per_file=rows_per_file,
            max_bad_rows=max_bad_rows,
            progress=lambda done: bar.show(done, len(rows), "row"),
        )
    print(f"{out} ({', '.join(f'{name}: {count}' for name, count in counts.items())})")
