"""Tokenizers as others keep them: which file counts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from pumice.errors import InputError
from pumice.formats.text.files import TokenizerFiles
from pumice.formats.text.tokenizer import read_tokenizer
from pumice.tokens import Tokenizer

WORDS = ["<unk>", "<s>", "</s>", "a", "b", "<image>"]


def write_json(folder: Path, bos: bool = True) -> Path:
    backend = tokenizers.Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write(folder: Path, file: str, **values: Any) -> None:
    (folder / file).write_text(json.dumps(values), encoding="utf-8")


def named(files: TokenizerFiles) -> tuple[Any, ...]:
    return files.bos, files.eos, files.adds_bos, files.bos_id


def test_a_bare_tokenizer_json_says_what_it_puts_first(tmp_path: Path) -> None:
    assert named(read_tokenizer(write_json(tmp_path))) == ("<s>", None, True, 1)
    assert named(read_tokenizer(write_json(tmp_path, bos=False))) == (None, None, False, None)


def test_a_bare_sentencepiece_model_begins_texts_as_llamas(sentencepiece_file: Path) -> None:
    files = read_tokenizer(sentencepiece_file)
    assert named(files) == ("<s>", "</s>", True, 1)
    assert files.backend.encode("a</s>a").tokens == ["<s>", "▁a", "</s>", "▁a"]


def test_the_files_beside_it_count(sentencepiece_file: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    write(tmp_path, "special_tokens_map.json", pad_token={"content": "<unk>"}, bos_token="<s>", eos_token="x")
    write(
        tmp_path, "tokenizer_config.json", eos_token="</s>", legacy=False, add_bos_token=False,
        additional_special_tokens=["▁the", "<nowhere>"], chat_template="{{ messages }}",
        added_tokens_decoder={
            "0": {"content": "<unk>", "special": True},
            "32001": {"content": "<tool>", "special": False}, "32000": {"content": "<pad>", "special": True},
        },
    )  # fmt: skip
    write(tmp_path, "added_tokens.json", **{"<im_start>": 32002, "<pad>": 32000})
    files = read_tokenizer(tmp_path)
    assert named(files) == ("<s>", "</s>", False, None)
    assert files.chat_template == "{{ messages }}"
    assert files.backend.encode("a</s>a<im_start>").tokens == ["▁a", "</s>", "a", "<im_start>"]
    special = Tokenizer(files.backend).special
    assert {t: special.get(t) for t in ("<pad>", "<im_start>", "▁the", "<tool>", "<nowhere>")} == {
        "<pad>": 32000, "<im_start>": 32002, "▁the": 272, "<tool>": None, "<nowhere>": None,
    }  # fmt: skip
    assert files.backend.token_to_id("<tool>") == 32001


@pytest.mark.parametrize("number", ["nine", "-1", "9" * 5000])
def test_an_added_token_needs_an_id(sentencepiece_file: Path, tmp_path: Path, number: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    write(tmp_path, "tokenizer_config.json", added_tokens_decoder={number: {"content": "<pad>"}})
    with pytest.raises(InputError, match=r"added_tokens_decoder gives .*, not the id of a token"):
        read_tokenizer(tmp_path)


def test_a_tokenizer_json_comes_before_a_sentencepiece_model(
    sentencepiece_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    write_json(tmp_path)
    write(tmp_path, "tokenizer_config.json", image_token="<image>", add_bos_token=False, bos_token="<s>")
    files = read_tokenizer(tmp_path)
    assert files.backend.get_vocab_size() == len(WORDS)
    assert named(files) == ("<s>", None, False, None)
    assert Tokenizer(files.backend).special == {"<image>": 5, "<s>": 1}


@pytest.mark.parametrize(
    ("file", "text", "template"),
    [
        ("chat_template.jinja", "{{ a }}", "{{ a }}"),
        ("chat_template.json", '{"chat_template": "{{ b }}"}', "{{ b }}"),
        ("processor_config.json", '{"chat_template": "{{ c }}"}', "{{ c }}"),
        ("tokenizer_config.json", '{"chat_template": "{{ d }}"}', "{{ d }}"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x", "template": "y"}]}', None),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "rag", "template": "y"}, {"name": "default", "template": "z"}]}',
            "z",
        ),
        ("tokenizer_config.json", "{}", None),
    ],
)
def test_where_a_chat_template_stands(tmp_path: Path, file: str, text: str, template: str | None) -> None:
    write_json(tmp_path)
    (tmp_path / file).write_text(text)
    assert read_tokenizer(tmp_path).chat_template == template


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"there is no tokenizer at .*; put a tokenizer\.json or tokenizer\.model there"),
        ({"tokenizer.json": "{}"}, r"tokenizer\.json is not a tokenizer\.json"),
        ({"tokenizer.json": "{"}, r"tokenizer\.json is not a tokenizer\.json"),
        ({"tokenizer.model": "{}"}, r"tokenizer\.model is no SentencePiece model, or damaged"),
        ({"tokenizer.json": None, "tokenizer_config.json": "["}, r"tokenizer_config\.json is not JSON"),
        (
            {"tokenizer.json": None, "added_tokens.json": '{"<pad>": 7}'},
            r"added_tokens\.json gives '<pad>' the id 7, but the next free id is 6; take all files",
        ),
        (
            {"tokenizer.json": None, "added_tokens.json": '{"a": 7}'},
            r"added_tokens\.json gives 'a' the id 7, but tokenizer\.json has 3",
        ),
    ],
)
def test_wrong_folders_are_refused(tmp_path: Path, files: dict[str, str | None], message: str) -> None:
    for name, text in files.items():
        if text is None:
            write_json(tmp_path)
        else:
            (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_tokenizer(tmp_path)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no tokenizer at .*none; give a tokenizer\.json, "):
        read_tokenizer(tmp_path / "none")
    (tmp_path / "rows").write_text("[1]")
    with pytest.raises(InputError, match=r"rows is not a tokenizer\.json"):
        read_tokenizer(tmp_path / "rows")
    (tmp_path / "empty").write_text("")
    with pytest.raises(InputError, match="empty is no whole SentencePiece model"):
        read_tokenizer(tmp_path / "empty")
