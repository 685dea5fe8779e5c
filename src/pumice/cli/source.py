"""The options that say which rows of a source are meant, and what its columns are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from pumice.errors import InputError

if TYPE_CHECKING:
    from pumice.data.rows import Rows

Source = Annotated[
    str,
    Argument(
        help="Rows in any format: a file, a folder, a glob, or hf://owner/name (docs/data.md lists them).",
        metavar="SOURCE",
    ),
]


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read, as a recipe's `data` says it."""

    columns: Annotated[
        tuple[str, ...], Option(help="What a column is for: image=photo; repeat.", metavar="ROLE=COLUMN")
    ] = ()
    ask: Annotated[
        str | None, Option(help="What is asked about a caption, a text or a label.", metavar="QUESTION")
    ] = None
    split: Annotated[str | None, Option(help="Of a set with several.")] = None
    config: Annotated[str | None, Option(help="Of a set with several.")] = None
    revision: Annotated[str | None, Option(help="Of a set on the hub.")] = None

    def open(self, source: str) -> Rows:
        """Return the rows of a source. Raises InputError."""
        from pumice.data.mapping import RowMapping
        from pumice.data.rows import Rows
        from pumice.data.sources.recognise import Part

        mapping = RowMapping(self._columns(), self.ask)
        return Rows(source, mapping=mapping, part=Part(self.split, self.config, self.revision))

    def _columns(self) -> Mapping[str, str]:
        pairs = [pair.partition("=") for pair in self.columns]
        for role, equals, column in pairs:
            if not (role and equals and column):
                raise InputError(
                    f"--columns {role}{equals}{column}: write ROLE=COLUMN, for example image=photo"
                )
        return {role: column for role, _, column in pairs}
