"""Read the text side of a model: its tokenizer, its chat format and the tokens that end an answer."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers

from pumice.config import ChatFormat, ModelConfig
from pumice.errors import CAUSE, InputError, shorten, wrong_input
from pumice.formats.text.chat_template import Described
from pumice.formats.text.files import TokenizerFiles
from pumice.formats.text.isolated import describe, image_wrap
from pumice.formats.text.tokenizer import read_tokenizer
from pumice.storage.json_file import Keys
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import LazyStateDict
from pumice.templates import OWN, TEMPLATES, Template, get_template
from pumice.tokens import Tokenizer

_MARKER = re.compile(r"<[^\s<>]+>")  # how tokens that end an answer are written


@dataclass(frozen=True)
class TextSide:
    """A tokenizer's files. stop_ids: the tokens that end an answer, as the model's other files say.

    notes: what these files say that is not read.
    """

    files: TokenizerFiles
    stop_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return self.files.backend

    def model_config(
        self,
        template: str | None,
        label: str,
        *,
        usual: str | None = None,
        fallback: str | None = None,
        **parts: Any,
    ) -> tuple[ModelConfig, tuple[str, ...]]:
        """Return the config of a model with this text side, and notes on what was assumed.

        template: the name of the chat format. By default it is `usual`; without that, what the chat template
        describes; without that, `fallback`. label: names the model in errors. parts: the other fields of
        ModelConfig. Raises InputError if no format is known, or the tokenizer lacks the format's tokens.
        """
        described, note = self.chat_format(template, label, usual, fallback)
        name, chat = described.template, described.chat
        # Embeddings often have more rows than the tokenizer has tokens, but never fewer.
        tokens = Tokenizer(self.tokenizer)
        tokens.check_rows(parts["decoder"].vocab_size, f"{label}: ")
        # An answer ends with the tokens that the model's files name, and with those that its chat format
        # writes.
        with wrong_input(InputError, f"{label} does not suit the template {name!r}: {CAUSE}"):
            stops = tokens.stops(get_template(name, chat))
        config = ModelConfig(
            **parts,
            template=name,
            chat=chat,
            stop_token_ids=tuple(dict.fromkeys((*self._stop_ids(), *stops))),
            bos_token_id=self.bos_id(described.writes_bos),
        )
        return config, (*self.notes, *([note] if note else []), *self._unknown_tokens(chat))

    def parts(
        self, config: ModelConfig, state: LazyStateDict, notes: tuple[str, ...] = (), **more: Any
    ) -> LoadedParts:
        """Return a model with this text side. more: the other fields of LoadedParts."""
        files = self.files
        return LoadedParts(
            config, state, files.backend, {}, notes=notes, sentencepiece=files.sentencepiece, **more
        )

    def _unknown_tokens(self, chat: ChatFormat | None) -> list[str]:
        """Return notes on the tokens that the folder's files name and the tokenizer lacks."""
        notes = [
            f"the tokenizer's files name {shorten(text)} as its {role} token, but its vocabulary lacks it"
            for role, text in (("bos", self.files.bos), ("eos", self.files.eos))
            if text is not None and self.tokenizer.token_to_id(text) is None
        ]
        stop = "" if chat is None else chat.stop.strip()
        if _MARKER.fullmatch(stop) and self.tokenizer.token_to_id(stop) is None:
            notes.append(
                f"the chat template ends answers with {stop!r}, which is no token of the "
                "tokenizer: they may belong to two models"
            )
        return notes

    def image_wrap(self) -> tuple[str, str] | None:
        """Return the special tokens that the chat template writes around each picture, if any."""
        files = self.files
        if files.chat_template is None:
            return None
        special = list(Tokenizer(self.tokenizer).special)
        return image_wrap(files.chat_template, bos=files.bos, eos=files.eos, specials=special)

    def bos_id(self, writes_bos: bool) -> int | None:
        """Return the token that begins a conversation. writes_bos: whether the chat template writes it."""
        if self.files.bos_id is None and writes_bos and self.files.bos is not None:
            return self.tokenizer.token_to_id(self.files.bos)
        return self.files.bos_id

    def chat_format(
        self, template: str | None, label: str, usual: str | None = None, fallback: str | None = None
    ) -> tuple[Described, str]:
        """Return the chat format, and a note, or "", on how it was found."""
        # The user's choice comes first. OWN asks for the model's chat template, even if another is usual.
        source = self.files.chat_template
        if template is not None and template != OWN:
            return Described(template), ""
        if usual is not None and template is None:
            return Described(usual), self._other_than(usual, label)
        if source is not None:
            described = self._described(source, label)
            return described, self._contradicted(described, label)
        if fallback is not None and template is None:
            return Described(fallback), f"no file says the chat format; {fallback} was assumed"
        raise InputError(
            f"{label} has no chat template; name its format with --template, one of: {', '.join(TEMPLATES)}"
        )

    def _described(self, source: str, label: str) -> Described:
        special = list(Tokenizer(self.tokenizer).special)
        return describe(source, bos=self.files.bos, eos=self.files.eos, specials=special, label=label)

    def _other_than(self, usual: str, label: str) -> str:
        """Return a note on a format that was assumed, though the tokenizer may have a chat template."""
        if self.files.chat_template is None:
            return f"no file says the chat format; {usual} was assumed"
        try:
            described = self._described(self.files.chat_template, label)
        except InputError:
            return (
                f"{usual} was assumed; the tokenizer's chat template, which is no such format, was left out"
            )
        own, known = described.chat, TEMPLATES[usual]
        without_tools = None if own is None else replace(own, tools=None)
        if described.template == usual or (isinstance(known, Template) and without_tools == known.chat):
            return ""
        name = f"{described.template}, " if described.template != OWN else ""
        return (
            f"the tokenizer's chat template writes another format ({name}--template own takes it); {usual}, "
            "in which the published models were trained, was assumed"
        )

    def _contradicted(self, described: Described, label: str) -> str:
        """Return a note if the folder's files hold chat templates that write different formats."""
        for source in self.files.other_templates:
            try:
                other = self._described(source, label)
            except InputError:
                other = None
            if other is None or (other.template, other.chat) != (described.template, described.chat):
                return (
                    "the folder's files hold chat templates that write different formats; the newest was "
                    "read (chat_template.jinja, then chat_template.json, processor_config.json, "
                    "tokenizer_config.json)"
                )
        return ""

    def _stop_ids(self) -> tuple[int, ...]:
        if self.stop_ids:
            return self.stop_ids
        eos = None if self.files.eos is None else self.tokenizer.token_to_id(self.files.eos)
        return () if eos is None else (eos,)


def read_text_side(folder: Path, config: Keys) -> TextSide:
    """Read the text side of a folder of transformers or of the original LLaVA. config: its config.json."""
    # generation_config.json overrides config.json, which overrides its text_config. Without any of them, the
    # tokenizer's eos token ends an answer.
    sources = [config, config.object("text_config")]
    notes: tuple[str, ...] = ()
    if (path := folder / "generation_config.json").is_file():
        generation = Keys.of(path)
        sources.insert(0, generation)
        if (beams := generation.values.get("num_beams")) not in (None, 1):
            notes = (
                f"{path.name} asks for num_beams {beams}, which is not read; ask with num_beams yourself",
            )
    stop_ids: tuple[int, ...] = ()
    for keys in sources:
        if "eos_token_id" in keys and not stop_ids:
            value = keys.values["eos_token_id"]
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(number, int) for number in ids):
                raise InputError(
                    f"{keys.label}: eos_token_id should be a number or a list of them, not {value!r}"
                )
            stop_ids = tuple(ids)
    return TextSide(read_tokenizer(folder), stop_ids, notes)
