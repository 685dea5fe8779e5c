"""A conversation becomes a Sample: the only meeting of text and pictures.

Training, evaluation, chat and serving all pass here. Numpy only, no torch.

Shapes: T tokens, M pictures, S pixels on a side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pumice.config import ModelConfig
from pumice.conversation import Conversation, ImagePart
from pumice.errors import InputError
from pumice.images import open_image, pixels
from pumice.templates import get_template
from pumice.tokens import IGNORE, Tokenizer, encode


@dataclass(frozen=True)
class Sample:
    """Ids, labels and pictures of one conversation.

    input_ids (T,) int64 with IMAGE_TOKEN placeholders; labels (T,) int64, IGNORE where not
    supervised: labels[t] is input_ids[t], to be predicted from what stands before t.
    """

    id: str
    input_ids: np.ndarray
    labels: np.ndarray
    images: tuple[ImagePart, ...]

    @property
    def supervised(self) -> int:
        return int((self.labels != IGNORE).sum())


class Processor:
    """What a checkpoint knows about preparing input: its template, tokenizer and image policy."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.template = get_template(config.template)
        if len(tokenizer) > config.decoder.vocab_size:
            rows = config.decoder.vocab_size
            raise InputError(f"the tokenizer has {len(tokenizer)} tokens, the embedding only {rows} rows")

    def training_sample(self, conversation: Conversation) -> Sample:
        """An answered conversation with its labels. InputError when nothing would be supervised."""
        conversation.check(answered=True)
        sample = self._sample(conversation, generate=False)
        if not sample.supervised:
            raise InputError(f"conversation {conversation.id!r}: nothing is supervised by its template")
        return sample

    def prompt(self, conversation: Conversation) -> Sample:
        """A conversation that ends in a question, up to where the model's answer begins."""
        sample = self._sample(conversation.check(answered=False), generate=True)
        if not len(sample.input_ids):
            raise InputError(f"the template {self.template.name!r} sees pictures only; show one")
        return sample

    def _sample(self, conversation: Conversation, *, generate: bool) -> Sample:
        spans = self.template.render(conversation, generate=generate)
        images = tuple(span for span in spans if isinstance(span, ImagePart))
        counts = [self.config.image_tokens] * len(images)
        input_ids, labels = encode(spans, self.tokenizer, counts, self.config.bos_token_id)
        limit = self.config.decoder.context
        if len(input_ids) > limit:
            name = f"conversation {conversation.id!r}" if conversation.id else "the conversation"
            raise InputError(f"{name} takes {len(input_ids)} tokens, the model's context is {limit}")
        return Sample(conversation.id, np.array(input_ids, np.int64), np.array(labels, np.int64), images)

    def pixels(self, images: tuple[ImagePart, ...]) -> np.ndarray:
        """Pictures -> pixels (M, 3, S, S) float32, by the checkpoint's image policy."""
        size = self.config.vision.image_size
        opened = [pixels(open_image(image.source), size, self.config.image) for image in images]
        return np.stack(opened) if opened else np.zeros((0, 3, size, size), np.float32)
