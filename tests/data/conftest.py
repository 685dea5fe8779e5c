"""Twenty-four rows about twelve pictures, and a tokenizer that shows which labels a row gives."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pumice.boxes import FORMS, BoxMap, write_boxes
from pumice.data.rows import ImageFinder, Row
from pumice.images import image_size, read_image
from pumice.templates import get_template
from pumice.tokens import Tokenizer, encode

sys.path.insert(0, str(Path(__file__).parent))  # for `samples`, which test files import


@pytest.fixture
def examples(tmp_path: Path) -> Any:
    from samples import make_examples

    return make_examples(tmp_path)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    return Tokenizer(backend)


Learned = Callable[[Row, ImageFinder], tuple[list[int], list[int], list[bytes]]]


@pytest.fixture(scope="session")
def learned(tokenizer: Tokenizer) -> Learned:
    """The ids and labels of a row, its boxes in shares of their pictures, and the bytes of its pictures."""

    def learned(row: Row, finder: ImageFinder) -> tuple[list[int], list[int], list[bytes]]:
        conversation = row.conversation(finder)
        sizes = [image_size(image.source) for image in conversation.images]
        conversation = write_boxes(conversation, [BoxMap(FORMS["picture"], size) for size in sizes])
        spans = get_template("chatml").render(conversation)
        ids, labels = encode(spans, tokenizer, [3] * len(conversation.images), None)
        return ids, labels, [bytes(read_image(image.source)) for image in conversation.images]

    return learned
