"""Spans become token ids and labels, side by side; a picture becomes N placeholders.

Knows the tokenizer. Does not know templates' wording, pixels or tensors. The loss mask is built here
with the ids and never recovered afterwards.
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from pumice.config import IMAGE_TOKEN
from pumice.conversation import ImagePart
from pumice.errors import InputError
from pumice.templates import Span, Spans

IGNORE = -100  # a label that is not supervised


class Tokenizer:
    """A `tokenizers` tokenizer that knows which text may hold special tokens, and which may not."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self.special = {
            token.content: number
            for number, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        longest_first = sorted(self.special, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._lock = threading.Lock()

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        if not Path(path).is_file():
            raise InputError(f"there is no tokenizer at {path}; give a tokenizer.json")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception for a file it cannot read
            raise InputError(f"{path} is not a tokenizer.json: {error}") from error

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def id_of(self, token: str) -> int:
        number = self.backend.token_to_id(token)
        if number is None:
            raise InputError(f"the tokenizer has no token {token!r}, which the template needs")
        return number

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def pieces(self, text: str) -> list[tuple[int, int]]:
        """Ordinary text, special tokens in it read as text: a list of (id, first character)."""
        with self._lock:  # the switch belongs to the shared backend
            self.backend.encode_special_tokens = True
            encoding = self.backend.encode(text, add_special_tokens=False)
            self.backend.encode_special_tokens = False
        return [(number, start) for number, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)]

    def encode(self, spans: Sequence[Span]) -> list[tuple[int, bool]]:
        """The spans of one chunk (all text between two pictures): a list of (id, supervised).

        The chunk is cut only at special tokens in control spans; what lies between is tokenised whole,
        and each token takes the mark of the span in which its first character stands.
        """
        starts, marks, text, cuts = [], [], "", []
        for span in spans:
            starts.append(len(text))
            marks.append(span.supervised)
            if span.control:
                cuts += [
                    (len(text) + m.start(), m.group()) for m in self._special_pattern.finditer(span.text)
                ]
            text += span.text

        def mark(position: int) -> bool:
            return marks[bisect_right(starts, position) - 1]

        tokens: list[tuple[int, bool]] = []
        begin = 0
        for position, token in [*cuts, (len(text), "")]:
            if begin < position:
                tokens += [(n, mark(begin + s)) for n, s in self.pieces(text[begin:position])]
            if token:
                tokens.append((self.special[token], mark(position)))
            begin = position + len(token)
        return tokens


def encode(
    spans: Spans, tokenizer: Tokenizer, image_tokens: Iterable[int], bos: int | None = None
) -> tuple[list[int], list[int]]:
    """Spans -> input_ids and labels of equal length.

    image_tokens: of each picture, in order: as many placeholders. bos: a token that stands first of all.
    """
    counts = iter(image_tokens)
    input_ids: list[int] = [] if bos is None else [bos]
    labels: list[int] = [IGNORE] * len(input_ids)
    chunk: list[Span] = []

    def flush() -> None:
        for number, supervised in tokenizer.encode(chunk):
            input_ids.append(number)
            labels.append(number if supervised else IGNORE)
        chunk.clear()

    for span in spans:
        if isinstance(span, ImagePart):
            flush()
            count = next(counts)
            input_ids.extend([IMAGE_TOKEN] * count)
            labels.extend([IGNORE] * count)
        else:
            chunk.append(span)
    flush()
    return input_ids, labels
