"""Damaged and hostile GGUF files end in one sentence, whatever was changed in them."""

from __future__ import annotations

import dataclasses
import math
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from pumice.config import DecoderConfig
from pumice.errors import InputError
from pumice.formats.gguf.file import GgufFile
from pumice.formats.gguf.llm import GgufModel, decoder_config, open_gguf
from pumice.formats.gguf.metadata import check_metadata
from pumice.formats.gguf.tokenizer import tokenizer_files

SMALL = DecoderConfig(
    vocab_size=266, width=32, depth=1, heads=4, kv_heads=2, head_dim=8, mlp_width=64, tied_head=True
)
VALUES: list[Any] = [
    0, -1, 1, 7, 2**31, 2**32 - 1, 2**64 - 1, 0.0, 1.5, math.nan, math.inf, -1e38, "", "x", "linear", "gpt2",
    "llama", True, False, [], [1], [3] * 266, ["a"], ["a"] * 300, ["a b"], [1.0], [True],
]  # fmt: skip
ABSENT = ["general.alignment", "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.scores"]
ABSENT += ["llama.rope.dimension_count", "llama.rope.scaling.type", "llama.rope.scaling.factor"]
ABSENT += ["llama.attention.sliding_window", "tokenizer.ggml.add_space_prefix"]


@pytest.fixture
def small(tmp_path: Path, write_gguf: Any) -> Path:
    write_gguf(tmp_path / "small.gguf", SMALL)
    return tmp_path / "small.gguf"


def read_everything(model: GgufModel) -> None:
    for tensor in model.state.values():
        tensor.read(torch.float32)


def test_any_value_of_any_key(small: Path) -> None:
    file = GgufFile(small)
    metadata = file.metadata
    refused = 0
    for key in [*metadata, *ABSENT]:
        for value in VALUES:
            file.metadata = {**metadata, key: value}
            try:
                check_metadata(file.metadata, "x.gguf")
                decoder_config(file)
                tokenizer_files(file)
            except InputError:
                refused += 1
    assert 0.8 < refused / len(VALUES) / (len(metadata) + len(ABSENT)) < 1


@pytest.mark.parametrize("seed", range(4))
def test_any_bytes_of_the_header(small: Path, tmp_path: Path, seed: int) -> None:
    data = small.read_bytes()
    header_end = min(info.offset for info in GgufFile(small).infos.values())
    rng = random.Random(seed)
    path = tmp_path / "mutated.gguf"
    for _ in range(50):
        mutated = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 4))):
            place = rng.randrange(4, header_end)
            number = rng.choice((0, 1, 7, 2**31, 2**32 - 1))
            mutated[place : place + 4] = rng.choice((struct.pack("<I", number), rng.randbytes(4)))
        path.write_bytes(mutated)
        try:
            read_everything(open_gguf(path))
        except InputError as error:
            assert str(path) in str(error)


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


@pytest.mark.parametrize(
    ("tensors", "header", "size"),
    [
        (1, text(b"t") + struct.pack("<IIQ", 0, 0, 0), 200),
        (1, text(b"t") + struct.pack("<I5QIQ", 5, 1, 1, 1, 1, 1, 0, 0), 200),
        (0, text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000, 100_000),
        (0, struct.pack("<Q", 2**64 - 1), 100),
        (0, text(b"a") + struct.pack("<IIQ", 9, 0, 1 << 27), (1 << 27) + 200),
    ],
    ids=["no dimension", "five dimensions", "lists of lists", "a long key", "a long list"],
)
def test_headers_that_no_program_writes(tmp_path: Path, tensors: int, header: bytes, size: int) -> None:
    path = tmp_path / "a.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, tensors, 1 - tensors) + header)
        file.truncate(size)
    with pytest.raises(InputError, match=r"a\.gguf is damaged or cut short"):
        GgufFile(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.alignment", 0, r"general\.alignment should be a whole number from 1 to .*, not 0"),
        ("llama.embedding_length", "32", r"should be a whole number from 1 to .*, not '32'"),
        ("llama.attention.head_count", 0, "should be a whole number from 1 to .*, not 0"),
        ("llama.rope.freq_base", math.nan, r"should be a number from 1 to 1e\+12, not nan"),
        ("llama.block_count", [1] * 100, r"should be a whole number .*, not \[1, 1, .*\.\.\."),
        ("tokenizer.ggml.tokens", [1, 2], r"tokens should be a list of texts, not \[1, 2\]"),
        ("tokenizer.ggml.bos_token_id", 266, "bos_token_id is 266, but there are 266 tokens"),
        ("tokenizer.ggml.merges", ["h zz"], "holds no tokenizer that can be built: .*zz"),
        ("tokenizer.ggml.add_bos_token", 1, "should be true or false, not 1"),
    ],
)
def test_what_is_wrong_is_named(small: Path, key: str, value: Any, message: str) -> None:
    file = GgufFile(small)
    file.metadata[key] = value
    with pytest.raises(InputError, match=message):
        check_metadata(file.metadata, str(small))
        decoder_config(file)
        tokenizer_files(file)


def test_more_tokens_than_embeddings(tmp_path: Path, write_gguf: Any) -> None:
    write_gguf(tmp_path / "m.gguf", dataclasses.replace(SMALL, vocab_size=200))
    with pytest.raises(InputError, match=r"m\.gguf has 266 tokens, but embeddings of 200 only"):
        open_gguf(tmp_path / "m.gguf")
