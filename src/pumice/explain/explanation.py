"""Explain an answer: where each word looked in the images, and whether the images mattered.

The finished answer runs through the model once more, together with its baselines (images grey, images
dropped), as one row. Answers that are not explained cost nothing.

Shapes: W words, N image tokens of all images, L layers, H heads, h x w cells of a map, R regions a side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pumice.conversation import Conversation, Message
from pumice.errors import InputError
from pumice.explain.attention import Passage, read, score
from pumice.explain.maps import TokenBoxes, grid_for, token_boxes
from pumice.explain.methods import DEFAULT, METHODS, choose_layers, get_method
from pumice.explain.reliance import PLAIN, Reliance, occluded, plain_picture, with_pictures, without_pictures
from pumice.explain.words import Word, averages, split
from pumice.images import open_image
from pumice.model.llava import Llava
from pumice.processor import Processor
from pumice.tokens import IGNORE

OCCLUSION_BATCH = 2048  # tokens of the passages that occlusion runs together
MAX_REGIONS = 16  # on a side: 256 passages to run

ImageTokens = Callable[[Conversation], Tensor | None]  # (N, D) of all images of a conversation


@dataclass(frozen=True)
class PictureMap:
    """One image and its heat.

    heat (W, h, w) float32: each word's weights on equal cells over the upright image. Its sum is the share of
    the word's weights that lies in this image. padding (W,): the share on padding. placeless (W,): the share
    on tokens that show no part of the image (class token, newlines). Over all images, the three sum to 1.
    occlusion (W, R, R), if asked for: nats that a word loses when a region is greyed.
    """

    image: Image.Image
    token_boxes: TokenBoxes
    tokens: tuple[int, int]  # its range of image tokens (first, last + 1) among those of all images
    heat: np.ndarray
    padding: np.ndarray
    placeless: np.ndarray
    occlusion: np.ndarray | None = None


@dataclass(frozen=True)
class Explanation:
    """The result of `explain`, as plain arrays.

    weights (W, N): of the chosen method; each word's sum to 1. attention (W, L, H, N): the model's attention,
    mean over a word's tokens; H is 1 if all heads would take too much memory. by_method: the weights of all
    methods that were computed.
    """

    question: str
    answer: str
    words: tuple[Word, ...]
    method: str
    layers: tuple[int, ...]
    pictures: tuple[PictureMap, ...]
    reliance: Reliance
    weights: np.ndarray
    attention: np.ndarray
    by_method: dict[str, np.ndarray]


def explain(
    model: Llava,
    processor: Processor,
    conversation: Conversation,
    answer: str | Callable[[], str],
    image_tokens: ImageTokens,
    *,
    method: str = DEFAULT,
    layers: Sequence[int] | None = None,
    occlusion: int = 0,
) -> Explanation:
    """Explain an answer to a conversation that has at least one image and ends with the user.

    answer: its text, or a function that generates the model's own answer; it is called after all input is
    checked. The text is tokenized as in training. image_tokens: a function that returns the image tokens of a
    conversation. method: one of `METHODS`. layers: numbers from 0, if the method allows a choice. occlusion:
    regions on a side to grey one by one, 0 for none; each region costs one pass. Raises InputError on wrong
    input. If the model's own answer is empty, so is the explanation.
    """
    # 1. Check everything before the model runs.
    chosen = get_method(method)
    config = model.config
    used = choose_layers(chosen, config.decoder.depth, layers)
    if type(occlusion) is not int or not 0 <= occlusion <= MAX_REGIONS:
        raise InputError(f"occlusion is {occlusion}; give the regions on a side, 0 (off) to {MAX_REGIONS}")
    conversation.check(answered=False)
    if not conversation.images:
        raise InputError("there is no picture to explain the answer by; show one with the question")
    images = [open_image(part.source) for part in conversation.images]
    if callable(answer):
        answer = answer()
    elif not isinstance(answer, str) or not answer.strip():
        raise InputError(
            "the answer to explain is empty or no text; give one, or leave it out to have one made"
        )
    question = next(m.text for m in reversed(conversation.messages) if m.role == "user").strip()
    layouts = processor.layouts(conversation.images)
    image_boxes = [
        (image, token_boxes(config, image.size, layout), layout.tokens)
        for image, layout in zip(images, layouts, strict=True)
    ]
    count = sum(tokens for _, _, tokens in image_boxes)
    if not answer.strip():
        attention = np.zeros((0, config.decoder.depth, config.decoder.heads, count), np.float32)
        weights = {method: np.zeros((0, count), np.float32)}
        reliance = Reliance(*(np.zeros(0, np.float32) for _ in range(4)))
        maps = _maps(image_boxes, weights[method], [None] * len(image_boxes))
        return Explanation(
            question, "", (), method, tuple(used), maps, reliance, weights[method], attention, weights
        )

    # 2. Run the answer and its baselines: with grey images of several kinds, and without images.
    reader = PassageBuilder(model, processor, image_tokens)
    ids, first = reader.answer_ids(conversation, answer)
    text, words = split(ids[first:].tolist(), processor.tokenizer.decode)
    color = config.image.pad_color
    greys = [[plain_picture(image.size, color, *kind) for image in images] for kind in PLAIN]
    passages = [reader.passage(conversation, ids, first), *_baselines(reader, conversation, greys, answer)]
    lowest = used[0] if chosen.gradient else None
    logprobs, record = read(model, passages, rollout=chosen.rollout, gradient_from=lowest)
    # 3. From tokens to words: attention is averaged, log-probabilities are summed.
    mean = averages(words, len(logprobs[0]))
    total = (mean > 0).astype(np.float32)
    # 4. Weights of the chosen method, and of all others that need nothing more.
    weights = {
        name: _shares(mean @ other.weigh(record, used if name == method else every))
        for name, other in METHODS.items()
        for every in [choose_layers(other, config.decoder.depth, None)]
        if (not other.rollout or chosen.rollout)
        and (not other.gradient or name == method or (lowest is not None and every[0] >= lowest))
    }
    attention = np.tensordot(mean, record.attention.numpy(), 1)
    # 5. Compare with the baselines. Of the grey ones, the one counts that makes the answer most likely.
    by_word = [total @ values.numpy() for values in logprobs]
    grey = max(by_word[1 : 1 + len(PLAIN)], key=lambda values: float(values.sum()))
    dropped = by_word[-1] if len(by_word) > 1 + len(PLAIN) else grey
    reliance = Reliance(by_word[0], dropped, grey, attention.sum(-1).mean((1, 2)))
    # 6. Grey the images region by region, if asked for.
    occlusions: list[np.ndarray | None] = [None] * len(images)
    if occlusion:
        occlusions = [
            _occlude(reader, conversation, images, number, answer, total, by_word[0], occlusion)
            for number in range(len(images))
        ]
    maps = _maps(image_boxes, weights[method], occlusions)
    return Explanation(
        question, text, tuple(words), method, tuple(used), maps, reliance, weights[method], attention, weights
    )


@dataclass(frozen=True)
class PassageBuilder:
    """Builds passages from conversations and answers."""

    model: Llava
    processor: Processor
    image_tokens: ImageTokens

    def answer_ids(self, conversation: Conversation, answer: str) -> tuple[Tensor, int]:
        """Return the ids of prompt and answer, without the stop text, and the answer's start."""
        answered = Conversation((*conversation.messages, Message("assistant", (answer,))))
        sample = self.processor.training_sample(answered)
        # 1. The answer is the last stretch of supervised tokens.
        end = len(sample.labels) - int(np.argmax(sample.labels[::-1] != IGNORE))
        ignored = np.flatnonzero(sample.labels[:end] == IGNORE)
        first = int(ignored[-1]) + 1 if len(ignored) else 0
        if not first:  # a template without a prompt, of a tokenizer without a first token
            raise InputError("the answer's first word has nothing before it to be predicted from")
        ids, decode = sample.input_ids[first:end].tolist(), self.processor.tokenizer.decode
        # 2. Cut off the stop text: keep the fewest tokens that give the answer's text.
        text = decode(ids).strip().removesuffix(self.processor.template.stop.strip()).rstrip()
        last = next(n for n in range(1, len(ids) + 1) if decode(ids[:n]).strip().startswith(text))
        return torch.from_numpy(sample.input_ids[: first + last]), first

    def passage(self, conversation: Conversation, ids: Tensor, first: int) -> Passage:
        """Build a passage from the ids of prompt and answer. The answer begins at index `first`."""
        tokens = self.image_tokens(conversation) if conversation.images else None
        return Passage.of(ids[:first], tokens, ids[first:].tolist())


def _baselines(
    reader: PassageBuilder, conversation: Conversation, greys: Sequence[Sequence[Image.Image]], answer: str
) -> list[Passage]:
    """Build passages of the answer with each set of grey images, and last without images.

    The template "plain" of stage 1 has no prompt without an image, so its last passage is left out.
    """
    changed = [with_pictures(conversation, images) for images in greys]
    if reader.processor.template.name != "plain":
        changed.append(without_pictures(conversation))
    return [reader.passage(other, *reader.answer_ids(other, answer)) for other in changed]


def _occlude(
    reader: PassageBuilder,
    conversation: Conversation,
    images: Sequence[Image.Image],
    number: int,
    answer: str,
    total: np.ndarray,
    shown: np.ndarray,
    regions: int,
) -> np.ndarray:
    """Return the nats that each word loses when a region of image `number` is greyed: (W, R, R).

    total (W, n) sums tokens to words. shown (W,): the words' log-probabilities with the image as it is.
    """
    color = reader.model.config.image.pad_color
    lost = np.zeros((len(shown), regions, regions), np.float32)
    batch: list[tuple[int, int, Passage]] = []  # (row, column, passage)

    def flush() -> None:
        scores = score(reader.model, [passage for _, _, passage in batch])
        for (row, column, _), logprobs in zip(batch, scores, strict=True):
            lost[:, row, column] = shown - total @ logprobs.numpy()
        batch.clear()

    for row, column, copy in occluded(images[number], regions, color):
        changed = with_pictures(conversation, [*images[:number], copy, *images[number + 1 :]])
        ids, first = reader.answer_ids(changed, answer)
        batch.append((row, column, reader.passage(changed, ids, first)))
        if sum(len(p.input_ids) for _, _, p in batch) >= OCCLUSION_BATCH:
            flush()
    if batch:
        flush()
    return lost


def _shares(weights: np.ndarray) -> np.ndarray:
    """Scale rows to sum 1. A row of zeros stays zero."""
    sums = weights.sum(-1, keepdims=True)
    return np.divide(weights, sums, out=np.zeros_like(weights), where=sums > 0)


def _maps(
    image_boxes: Sequence[tuple[Image.Image, TokenBoxes, int]],
    weights: np.ndarray,
    occlusions: Sequence[np.ndarray | None],
) -> tuple[PictureMap, ...]:
    """Draw each image's part of the weights (W, N). image_boxes: (image, boxes, number of image tokens)."""
    maps, first = [], 0
    for (image, boxes, tokens), occlusion in zip(image_boxes, occlusions, strict=True):
        if len(boxes.boxes) != tokens:
            raise ValueError(f"the picture has {tokens} tokens, its map has {len(boxes.boxes)} boxes")
        own = weights[:, first : first + tokens]
        heat = boxes.paint(own, grid_for(boxes)).astype(np.float32)
        placeless = own[:, ~boxes.placed].sum(-1)
        padding = own @ (1 - boxes.inside()) - placeless
        token_range = (first, first + tokens)
        maps.append(PictureMap(image, boxes, token_range, heat, padding.clip(0), placeless, occlusion))
        first += tokens
    assert first == weights.shape[1]
    return tuple(maps)
