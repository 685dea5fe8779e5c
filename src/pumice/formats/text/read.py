"""How text reaches a model of others: its tokenizer, its chat format, and what ends its answers.

Knows: which of their files says what, and how that becomes the text half of a ModelConfig. Does not
know: tensors, or how a tokenizer's files (`tokenizer`) or a chat template (`chat_template`) are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from pumice.config import ChatFormat, ModelConfig
from pumice.errors import InputError
from pumice.formats.text.chat_template import describe, image_wrap
from pumice.formats.text.files import TokenizerFiles
from pumice.formats.text.tokenizer import read_tokenizer
from pumice.storage.json_file import Keys
from pumice.templates import OWN, TEMPLATES, get_template
from pumice.tokens import Tokenizer


@dataclass(frozen=True)
class TextSide:
    """A tokenizer's files, and the ids that a model's own files say end an answer."""

    files: TokenizerFiles
    ends: tuple[int, ...] = ()

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return self.files.backend

    def model_config(
        self,
        template: str | None,
        where: str,
        *,
        usual: str | None = None,
        fallback: str | None = None,
        **parts: Any,
    ) -> tuple[ModelConfig, tuple[str, ...]]:
        """The config of a model with this text half, and notes on what was assumed.

        template: as asked for; else `usual`, else what the chat template describes, else `fallback`.
        parts: the other fields of ModelConfig. Raises InputError when no format is known, or the tokenizer
        lacks its tokens.
        """
        name, chat, writes_bos, note = self._format(template, where, usual, fallback)
        rows = parts["decoder"].vocab_size
        tokens = Tokenizer(self.tokenizer)
        if len(tokens) > rows:
            raise InputError(
                f"{where}: the tokenizer has {len(tokens)} tokens, the embedding only {rows} rows"
            )
        bos = self.files.bos_id
        if bos is None and writes_bos and self.files.bos is not None:
            bos = self.tokenizer.token_to_id(self.files.bos)
        try:
            stops = tokens.stops(get_template(name, chat))
        except InputError as error:
            raise InputError(f"{where} does not suit the template {name!r}: {error}") from error
        config = ModelConfig(
            **parts,
            template=name,
            chat=chat,
            stop_token_ids=tuple(dict.fromkeys((*self._ends(), *stops))),
            bos_token_id=bos,
        )
        return config, (note,) if note else ()

    def image_wrap(self) -> tuple[str, str] | None:
        """The special tokens that the chat template writes around each picture."""
        files = self.files
        if files.chat_template is None:
            return None
        special = list(Tokenizer(self.tokenizer).special)
        return image_wrap(files.chat_template, bos=files.bos, eos=files.eos, specials=special)

    def _format(
        self, asked: str | None, where: str, usual: str | None, fallback: str | None
    ) -> tuple[str, ChatFormat | None, bool, str]:
        """(template, chat, whether the chat template writes the begin of text, what was assumed)."""
        source = self.files.chat_template
        if asked is not None and asked != OWN:
            return asked, None, False, ""
        if usual is not None and asked is None:
            return usual, None, False, f"no file says the chat format; {usual} was assumed"
        if source is not None:
            special = list(Tokenizer(self.tokenizer).special)
            found = describe(source, bos=self.files.bos, eos=self.files.eos, specials=special, where=where)
            return found.template, found.chat, found.writes_bos, ""
        if fallback is not None and asked is None:
            return fallback, None, False, f"no file says the chat format; {fallback} was assumed"
        raise InputError(
            f"{where} has no chat template; name its format with --template, one of: {', '.join(TEMPLATES)}"
        )

    def _ends(self) -> tuple[int, ...]:
        if self.ends:
            return self.ends
        eos = None if self.files.eos is None else self.tokenizer.token_to_id(self.files.eos)
        return () if eos is None else (eos,)


def read_text_side(folder: Path, config: Keys) -> TextSide:
    """A transformers or original folder's: its tokenizer, and the ends that it says.

    generation_config.json says them, before it config.json or the `text_config` in it, else the tokenizer.
    """
    places = [config, config.object("text_config")]
    if (generation := folder / "generation_config.json").is_file():
        places.insert(0, Keys.of(generation))
    ends: tuple[int, ...] = ()
    for keys in places:
        if "eos_token_id" in keys and not ends:
            value = keys.values["eos_token_id"]
            given = value if isinstance(value, list) else [value]
            if not all(isinstance(number, int) for number in given):
                raise InputError(
                    f"{keys.where}: eos_token_id should be a number or a list of them, not {value!r}"
                )
            ends = tuple(given)
    return TextSide(read_tokenizer(folder), ends)
