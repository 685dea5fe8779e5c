"""Rows in another format: an SQLite database, whose table `rows` has a column for each field of a row.

    python examples/extend/data_format.py data check rows.sqlite --images PICTURES

It is the `pumice` command with one more format. Files are known by their first bytes. A source gives its rows
as mappings of columns; what the columns mean is decided as for a table (docs/data.md).
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path

from pumice.cli import main
from pumice.data.sources.recognise import MAGIC, OPENERS
from pumice.data.sources.source import Joined, Record, Source
from pumice.errors import InputError


class SqliteRows(Source):
    form = "SQLite"

    def __init__(self, path: Path) -> None:
        self.label, self.files = str(path), [path]
        self._numbers = [row["rowid"] for row in self._select("SELECT rowid FROM rows ORDER BY rowid")]

    def __len__(self) -> int:
        return len(self._numbers)

    def record(self, index: int) -> Record:
        [row] = self._select("SELECT * FROM rows WHERE rowid = ?", self._numbers[index])
        return dict(row)

    def _select(self, query: str, *values: int) -> list[sqlite3.Row]:
        # A connection belongs to one thread, and rows are read in several.
        try:
            connection = sqlite3.connect(f"{self.files[0].resolve().as_uri()}?mode=ro", uri=True)
            try:
                connection.row_factory = sqlite3.Row
                return connection.execute(query, values).fetchall()
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise InputError(
                f"'{self.label}' cannot be read: {error}; write the table `rows` anew"
            ) from error


def open_databases(paths: Sequence[Path], label: str) -> Source:
    return Joined([SqliteRows(path) for path in paths], label)


MAGIC["sqlite"] = (b"SQLite format 3\0",)
OPENERS["sqlite"] = open_databases

if __name__ == "__main__":
    sys.exit(main())
