"""Near-duplicate texts among any number of rows, by MinHash, in bounded memory.

Of two similar texts the first stays. Signatures lie in a temporary database on disk, which is
deleted with the process.
"""

from __future__ import annotations

import re
import sqlite3
import zlib
from hashlib import blake2b

import numpy as np

# A pair of Jaccard similarity 0.8 is compared with probability 0.77, 0.9 with 0.99.
PERMUTATIONS, BANDS = 64, 8
RUN = 3  # words that hash together
_CACHE_KB = 65_536  # of the database in memory


class SeenRows:
    """Texts seen so far. Words are compared in runs of three, case and punctuation aside."""

    def __init__(self, threshold: float = 0.8) -> None:
        from datasketch import MinHash

        self.threshold = threshold
        self._new = MinHash(PERMUTATIONS, seed=1, hashfunc=zlib.crc32)
        self._store = sqlite3.connect("")  # SQLite's own name for a temporary file that nobody else sees
        self._store.executescript(
            f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -{_CACHE_KB};"
            "CREATE TABLE bands (band INTEGER PRIMARY KEY, text INTEGER) WITHOUT ROWID;"
            "CREATE TABLE texts (number INTEGER PRIMARY KEY, name TEXT, signature BLOB);"
        )
        self._count = 0

    def like(self, name: str, text: str, scope: str = "") -> str | None:
        """The name of an earlier text of the same scope that this one repeats; else None, and remember it."""
        signature = self._signature(text, scope)
        keys = [
            int.from_bytes(
                blake2b(part.tobytes(), digest_size=8, salt=bytes([n])).digest(), "big", signed=True
            )
            for n, part in enumerate(np.split(signature, BANDS))
        ]
        marks = ",".join("?" * BANDS)
        query = (
            f"SELECT DISTINCT name, signature FROM bands JOIN texts ON text = number WHERE band IN ({marks}) "
            "ORDER BY number"
        )
        for other, stored in self._store.execute(query, keys):
            if np.mean(np.frombuffer(stored, signature.dtype) == signature) >= self.threshold:
                return str(other)
        self._count += 1
        self._store.execute("INSERT INTO texts VALUES (?, ?, ?)", (self._count, name, signature.tobytes()))
        self._store.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", [(k, self._count) for k in keys])
        return None

    def _signature(self, text: str, scope: str) -> np.ndarray:
        words = re.findall(r"\w+", text.lower())
        runs = {" ".join(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))}
        sketch = self._new.copy()
        sketch.update_batch([f"{scope}\0{run}".encode() for run in sorted(runs)])
        values: np.ndarray = sketch.digest()
        return values
