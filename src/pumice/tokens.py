"""Turn spans of text into token ids and labels, and each picture into its placeholders.

The loss mask is built together with the ids, never recovered afterwards.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import json
import os
import re
import threading
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from pumice.config import IMAGE_TOKEN
from pumice.conversation import ImagePart
from pumice.errors import CAUSE, ContextOverflow, InputError, shorten, wrong_input
from pumice.stopping import check_stopped
from pumice.templates import Plain, Span, Spans, Template

IGNORE = -100  # a label that is not supervised
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a SentencePiece token of one byte
_BAD_BYTES = "pumice.tokens"
PIECE = 1 << 15  # characters; of a longer text the tokens are counted piece by piece first
COMPOSED = 4  # characters of which Unicode composition makes one, at most
# One text is tokenized at a time. The library's threads gain nothing, and a fork after them would warn.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# The letters that stand for bytes in byte-level BPE (GPT-2's encoder.py): itself where it can be printed.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_LETTERS = {chr(b): b for b in _PRINTABLE} | {chr(256 + n): b for n, b in enumerate(_OTHERS)}


def _replace_each(error: UnicodeError) -> tuple[str, int]:
    """Return one replacement character per bad byte, as SentencePiece does. Python would join several."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_BAD_BYTES, _replace_each)


class Tokenizer:
    """A `tokenizers` tokenizer that knows which text may hold special tokens, and which may not.

    drops_space: decoding leaves out the space at the front of a text, as SentencePiece does.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self.special = {
            token.content: number
            for number, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        longest_first = sorted(self.special, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        steps = [step["type"] for step in _state(backend.decoder).get("decoders", ())]
        self._has_bytes, self.drops_space = "ByteFallback" in steps, "Strip" in steps
        # SentencePiece's newer behaviour: only what stands at the very beginning gets a space before it.
        self._prefix_first = _state(backend.pre_tokenizer).get("prepend_scheme") == "first"
        self._lock = threading.Lock()  # of the next line and of the backend's switches
        self._encoding = 0  # texts that are tokenized now
        self._prefix_lock = threading.Lock()

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        if not Path(path).is_file():
            raise InputError(f"there is no tokenizer at {path}; give a tokenizer.json")
        with wrong_input(OSError, f"{path} cannot be read: {CAUSE}; check the file"):
            data = Path(path).read_bytes()
        return cls(parse_tokenizer(data, path))

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    @property
    def rows(self) -> int:
        """The rows that an embedding needs to have one for every id. The ids of a file may have gaps."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def check_rows(self, rows: int, label: str = "") -> None:
        """Raise InputError, which begins with `label`, unless an embedding of `rows` has every token."""
        if len(self) > rows:
            raise InputError(f"{label}the tokenizer has {len(self)} tokens, the embedding only {rows} rows")
        if self.rows > rows:
            largest = self.rows - 1
            raise InputError(f"{label}the tokenizer has a token {largest}, the embedding only {rows} rows")

    def id_of(self, token: str) -> int:
        number = self.backend.token_to_id(token)
        if number is None:
            raise InputError(f"the tokenizer has no token {shorten(token)}, which the template needs")
        return number

    def stops(self, template: Template | Plain) -> tuple[int, ...]:
        """The ids that end an answer; none when the template's `stop` is ordinary text.

        Raises InputError when the tokenizer lacks a special token of the template's.
        """
        numbers = {token: self.id_of(token) for token in template.specials}
        return (numbers[template.stop],) if template.stop in numbers else ()

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        if not self._has_bytes:
            return self.backend.decode(list(ids), skip_special_tokens=True)
        # Decode as SentencePiece does. The backend's own decoder would replace a complete run of byte tokens
        # if only one byte of it is not, or not yet, a character.
        data = bytearray()
        at_start = self.drops_space
        for number in ids:
            piece = self.backend.id_to_token(number)
            if piece is None or piece in self.special:
                continue
            if byte := _BYTE.fullmatch(piece):
                data.append(int(byte[1], 16))
            else:
                text = piece.replace("▁", " ")
                data += (text.removeprefix(" ") if at_start else text).encode()
            at_start = False
        return data.decode(errors=_BAD_BYTES)

    def token_bytes(self, number: int) -> bytes | None:
        """Return the bytes of a token, also where they are a part of a character; None where unknown."""
        text = self.decode([number])
        if "\ufffd" not in text:
            return text.encode()
        piece = self.backend.id_to_token(number)
        if piece is not None and (byte := _BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        if piece is None or not all(letter in _BYTE_LETTERS for letter in piece):
            return None
        return bytes(_BYTE_LETTERS[letter] for letter in piece)

    def pieces(self, text: str, *, first: bool = True) -> list[tuple[int, int]]:
        """Tokenise text without special tokens: return a list of (id, position of its first character).

        first: the text stands at the very beginning, which some tokenizers write in their own way.
        """
        no_prefix = self._prefix_first and not first
        # The switch belongs to the shared backend. Without it, a short text waits for no long one.
        with self._prefix_lock if self._prefix_first else contextlib.nullcontext():
            if no_prefix:
                self.backend.pre_tokenizer.prepend_scheme = "never"
            try:
                encoding = self._encode(text)
            finally:
                if no_prefix:
                    self.backend.pre_tokenizer.prepend_scheme = "first"
        return [(number, start) for number, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)]

    def _encode(self, text: str) -> tokenizers.Encoding:
        """Return a text's tokens. Other threads run meanwhile: `encode` would hold Python's lock."""
        # 1. What looks like a special token is text. The first to come and the last to go turn the switch.
        with self._lock:
            if not self._encoding:
                self.backend.encode_special_tokens = True
            self._encoding += 1
        # 2. Tokenize.
        try:
            return self.backend.encode_batch([text], add_special_tokens=False)[0]
        except Exception as error:  # such as a character that it has no token for
            raise InputError(f"the model's tokenizer cannot write this text: {error}") from error
        finally:
            with self._lock:
                self._encoding -= 1
                if not self._encoding:
                    self.backend.encode_special_tokens = False

    @functools.cached_property
    def _longest(self) -> int:
        """The characters of the longest token."""
        return max(map(len, self.backend.get_vocab(with_added_tokens=True)), default=1)

    def check_length(self, texts: Sequence[str], limit: int, name: str = "the text") -> None:
        """Raise ContextOverflow if texts take more than `limit` tokens by far; do not tokenize all of them.

        name: of the texts in the message. What passes may still be too long by some tokens for each piece.
        """

        def check(tokens: int) -> None:
            if tokens > limit:
                message = f"{name} takes {tokens} tokens or more, the limit is {limit}; shorten it"
                raise ContextOverflow(message, tokens, limit)

        # 1. No token has more characters than the longest one.
        characters = sum(map(len, texts))
        check(characters // (COMPOSED * self._longest))
        if characters <= PIECE:
            return
        # 2. Count piece by piece. A token that a cut divides becomes as many as it has characters, at most.
        tokens = 0
        for text in texts:
            for start in range(0, len(text), PIECE):
                check_stopped()
                tokens += max(0, len(self._encode(text[start : start + PIECE])) - self._longest)
                check(tokens)

    def encode(self, spans: Sequence[Span], *, first: bool = True) -> list[tuple[int, bool]]:
        """Tokenise the spans of one chunk (all text between two pictures): a list of (id, supervised).

        The chunk is cut only at special tokens in control spans. The text between two cuts is tokenised in
        one piece. A token is supervised if the span of its first character is.
        """
        # 1. Join the texts, and find the special tokens at which the chunk is cut.
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

        # 2. Tokenise the text before each cut, then add the special token of the cut.
        tokens: list[tuple[int, bool]] = []
        begin = 0
        for position, token in [*cuts, (len(text), "")]:
            if begin < position:
                pieces = self.pieces(text[begin:position], first=first and begin == 0)
                tokens += [(number, mark(begin + start)) for number, start in pieces]
            if token:
                tokens.append((self.special[token], mark(position)))
            begin = position + len(token)
        return tokens


_ESCAPED_LETTER = re.compile(rb"\\u00[4-7]")
_SUBWORD_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')


def parse_tokenizer(text: bytes | str, label: str | Path) -> tokenizers.Tokenizer:
    """Return the tokenizer in a tokenizer.json. label: its name in an InputError.

    What trainers leave in the file is switched off: `truncation` and `padding`, which change the length of
    prompts, and `dropout`, which makes other tokens of a text each time. Raises InputError.
    """
    data = text if isinstance(text, bytes) else text.encode()
    try:
        if _ESCAPED_LETTER.search(data):  # no program writes one, and a key could hide behind it
            data = json.dumps(json.loads(data)).encode()
        if _SUBWORD_PREFIX.search(data):  # with merges that lack it, the library ends the process
            raise InputError("continuing_subword_prefix is set, as for no decoder")
        backend = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises nothing narrower
        reason = str(error).removeprefix("Cannot instantiate Tokenizer from buffer: ")
        raise InputError(
            f"{label} is not a tokenizer.json: {reason}; copy the file from the model's source again"
        ) from error
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None) is not None:
        backend.model.dropout = None
    check_patterns(backend, label)
    return backend


def check_patterns(backend: tokenizers.Tokenizer, label: str | Path) -> None:
    """Raise InputError if a tokenizer has a pattern that may take exponential time. label: its name in it."""
    states = [_state(part) for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder)]
    for state in states:
        if isinstance(state, list):
            states += state
        elif isinstance(state, dict):
            states += state.values()
            pattern = state.get("Regex")
            if isinstance(pattern, str) and repeats_twice(pattern):
                raise InputError(
                    f"{label} cuts text with {shorten(pattern)}, which may take forever: it repeats what "
                    "repeats or has alternatives; take the tokenizer from another source"
                )


_ESCAPE = re.compile(r"\\[pPx]\{[^}]*\}|\\.", re.DOTALL)
_QUANTIFIER = re.compile(r"([*+?]|\{\d*(?P<range>,?)\d*\})[+?]?")


def repeats_twice(pattern: str) -> bool:
    """Return whether a regular expression repeats a group in which something repeats or has alternatives.

    Such an expression may try exponentially many ways. Those of real tokenizers repeat single characters and
    classes.
    """
    groups = [False]  # the open ones: whether something in them repeats or has alternatives
    brackets = 0  # open classes
    after = False  # the same of the group that ends here
    place = 0
    while place < len(pattern):
        character, quantifier = pattern[place], _QUANTIFIER.match(pattern, place)
        if escape := _ESCAPE.match(pattern, place):
            place, after = escape.end(), False
            continue
        place += 1
        if character == "[":
            brackets += 1
            place += pattern.startswith("^", place)
            place += pattern.startswith("]", place)  # as the first of a class it is one of its characters
        elif brackets:
            brackets -= character == "]"
        elif character == "(":
            groups.append(False)
            place += pattern.startswith("?", place)
        elif character == ")" and len(groups) > 1:
            after = groups.pop()
            groups[-1] |= after
            continue
        elif character == "|":
            groups[-1] = True
        elif quantifier:
            if after and character != "?":
                return True
            groups[-1] |= character != "{" or bool(quantifier["range"])  # {3} matches in one way
            place = quantifier.end()
        after = False
    return False


def encode(
    spans: Spans, tokenizer: Tokenizer, image_tokens: Iterable[int], bos: int | None = None
) -> tuple[list[int], list[int]]:
    """Return the input_ids and labels of spans, both of equal length.

    image_tokens: the number of placeholders of each picture, in order. bos: the first token of the sequence.
    """
    counts = iter(image_tokens)
    input_ids: list[int] = [] if bos is None else [bos]
    labels: list[int] = [IGNORE] * len(input_ids)
    chunk: list[Span] = []
    first = True

    def flush() -> None:
        for number, supervised in tokenizer.encode(chunk, first=first):
            input_ids.append(number)
            labels.append(number if supervised else IGNORE)
        chunk.clear()

    for span in spans:
        if isinstance(span, ImagePart):
            flush()
            first = False
            count = next(counts)
            input_ids.extend([IMAGE_TOKEN] * count)
            labels.extend([IGNORE] * count)
        else:
            chunk.append(span)
    flush()
    return input_ids, labels


def _state(part: Any) -> dict[str, Any]:
    """Return the settings of one part of a `tokenizers` tokenizer, as in tokenizer.json."""
    return {} if part is None else json.loads(part.__getstate__())
