"""An answer explained: for each word where it looked, and whether the picture mattered.

Knows: a Llava, its processor, and how the other files of this folder join. Does not know: who answers,
pages, PNG, commands.

Normal answers pay nothing for this: the finished answer is read once more, together with its shadows
(pictures grey, pictures dropped), as one row.

Shapes: W words, N image tokens of all pictures, L layers, H heads, h x w cells of a map, R regions a side.
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
from pumice.explain.maps import Places, grid_for, places
from pumice.explain.methods import DEFAULT, METHODS, choose_layers, get_method
from pumice.explain.reliance import (
    PLAIN,
    Reliance,
    occluded,
    plain_picture,
    with_pictures,
    without_pictures,
)
from pumice.explain.words import Word, averages, split
from pumice.images import open_image
from pumice.model.llava import Llava
from pumice.processor import Processor
from pumice.tokens import IGNORE

PACKED = 2048  # tokens of passages that occlusion reads together
MOST_REGIONS = 16  # on a side: 256 answers to read again

ImageTokens = Callable[[Conversation], Tensor | None]  # (N, D) of all pictures of a conversation with some


@dataclass(frozen=True)
class PictureMap:
    """One picture and its heat.

    heat (W, h, w) float32: each word's weights on equal cells over the upright picture. Its sum is the share
    of the word's weights that lies in this picture; of all pictures, with padding and placeless, 1.
    padding (W,): the share that fell beside the picture, where the model saw padding. placeless (W,): on
    tokens without a place (class token, line ends). occlusion (W, R, R), when asked for: nats that a word
    loses when a region is greyed.
    """

    image: Image.Image
    places: Places
    tokens: tuple[int, int]  # first and last + 1 of its image tokens, counted over all pictures
    heat: np.ndarray
    padding: np.ndarray
    placeless: np.ndarray
    occlusion: np.ndarray | None = None


@dataclass(frozen=True)
class Explanation:
    """What `explain` found, as plain arrays.

    weights (W, N): what the chosen method gave, summing to 1 per word. attention (W, L, H, N): as it was,
    the mean over a word's tokens; H is 1 where the heads would have taken too much room. by_method: the
    weights of every method that was computed, the chosen one's among them.
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
    """Explain an answer to a conversation with at least one picture that ends with the user.

    answer: its text, or what makes the model's own, called when all else is right. Its tokens are those of
    the text as the model would be trained on it. image_tokens: those that the model sees of a conversation's
    pictures. method: one of `METHODS`. layers: those to look at, from 0, where the method lets one choose.
    occlusion: regions on a side to grey one by one, 0 for none; as many readings as regions. Raises
    InputError on wrong input; an answer of the model's own without words gives an explanation without words.
    """
    chosen = get_method(method)
    config = model.config
    used = choose_layers(chosen, config.decoder.depth, layers)
    if type(occlusion) is not int or not 0 <= occlusion <= MOST_REGIONS:
        raise InputError(f"occlusion is {occlusion}; give the regions on a side, 0 (off) to {MOST_REGIONS}")
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
    shown = [
        (image, places(config, image.size, layout), layout.tokens)
        for image, layout in zip(images, layouts, strict=True)
    ]
    count = sum(tokens for _, _, tokens in shown)
    if not answer.strip():
        looked = np.zeros((0, config.decoder.depth, config.decoder.heads, count), np.float32)
        empty = np.zeros((0, count), np.float32)
        nothing = Reliance(*(np.zeros(0, np.float32) for _ in range(4)))
        drawn = _maps(shown, empty, [None] * len(shown))
        return Explanation(
            question, "", (), method, tuple(used), drawn, nothing, empty, looked, {method: empty}
        )

    reader = Reader(model, processor, image_tokens)
    ids, first = reader.answer_ids(conversation, answer)
    text, words = split(ids[first:].tolist(), processor.tokenizer.decode)
    color = config.image.pad_color
    greys = [[plain_picture(image.size, color, *kind) for image in images] for kind in PLAIN]
    passages = [
        reader.passage(conversation, ids, first),
        *_shadows(reader, conversation, greys, answer),
    ]
    lowest = used[0] if chosen.gradient else None
    found, looks = read(model, passages, rollout=chosen.rollout, gradient_from=lowest)
    mean = averages(words, len(found[0]))
    total = (mean > 0).astype(np.float32)
    weights = {
        name: _shares(mean @ other.weigh(looks, used if name == method else every))
        for name, other in METHODS.items()
        for every in [choose_layers(other, config.decoder.depth, None)]
        if (not other.rollout or chosen.rollout)
        and (not other.gradient or name == method or (lowest is not None and every[0] >= lowest))
    }
    attention = np.tensordot(mean, looks.attention.numpy(), 1)
    logs = [total @ chances.numpy() for chances in found]
    grey = max(logs[1 : 1 + len(PLAIN)], key=lambda log: float(log.sum()))
    reliance = Reliance(
        logs[0], logs[-1] if len(logs) > 1 + len(PLAIN) else grey, grey, attention.sum(-1).mean((1, 2))
    )
    hidden: list[np.ndarray | None] = [None] * len(images)
    if occlusion:
        hidden = [
            _occlude(reader, conversation, images, number, answer, total, logs[0], occlusion)
            for number in range(len(images))
        ]
    drawn = _maps(shown, weights[method], hidden)
    return Explanation(
        question,
        text,
        tuple(words),
        method,
        tuple(used),
        drawn,
        reliance,
        weights[method],
        attention,
        weights,
    )


@dataclass(frozen=True)
class Reader:
    """What makes passages of answers: a model, its processor, and image tokens of conversations."""

    model: Llava
    processor: Processor
    image_tokens: ImageTokens

    def answer_ids(self, conversation: Conversation, answer: str) -> tuple[Tensor, int]:
        """The ids of prompt and answer, without what ends it, and where the answer begins."""
        said = Conversation((*conversation.messages, Message("assistant", (answer,))))
        sample = self.processor.training_sample(said)
        after = len(sample.labels) - int(np.argmax(sample.labels[::-1] != IGNORE))
        behind = np.flatnonzero(sample.labels[:after] == IGNORE)
        first = int(behind[-1]) + 1 if len(behind) else 0
        if not first:  # a template without a prompt, of a tokenizer without a first token
            raise InputError("the answer's first word has nothing before it to be predicted from")
        ids, decode = sample.input_ids[first:after].tolist(), self.processor.tokenizer.decode
        wanted = decode(ids).strip().removesuffix(self.processor.template.stop.strip()).rstrip()
        last = next(n for n in range(1, len(ids) + 1) if decode(ids[:n]).strip().startswith(wanted))
        return torch.from_numpy(sample.input_ids[: first + last]), first

    def passage(self, conversation: Conversation, ids: Tensor, first: int) -> Passage:
        """ids of prompt and answer, which begins at `first`, with the conversation's pictures."""
        tokens = self.image_tokens(conversation) if conversation.images else None
        return Passage.of(ids[:first], tokens, ids[first:].tolist())


def _shadows(
    reader: Reader, conversation: Conversation, greys: Sequence[Sequence[Image.Image]], answer: str
) -> list[Passage]:
    """The answer with its pictures grey, in each of the ways given, and last with them dropped.

    A template that shows pictures alone (stage 1's) has no prompt without them, and so no last one.
    """
    others = [with_pictures(conversation, pictures) for pictures in greys]
    if reader.processor.template.name != "plain":
        others.append(without_pictures(conversation))
    return [reader.passage(other, *reader.answer_ids(other, answer)) for other in others]


def _occlude(
    reader: Reader,
    conversation: Conversation,
    images: Sequence[Image.Image],
    number: int,
    answer: str,
    total: np.ndarray,
    shown: np.ndarray,
    regions: int,
) -> np.ndarray:
    """Nats that each word loses when a region of picture `number` is greyed: (W, R, R)."""
    color = reader.model.config.image.pad_color
    lost = np.zeros((len(shown), regions, regions), np.float32)
    waiting: list[tuple[int, int, Passage]] = []

    def flush() -> None:
        for (row, column, _), found in zip(
            waiting, score(reader.model, [p for _, _, p in waiting]), strict=True
        ):
            lost[:, row, column] = shown - total @ found.numpy()
        waiting.clear()

    for row, column, copy in occluded(images[number], regions, color):
        changed = with_pictures(conversation, [*images[:number], copy, *images[number + 1 :]])
        ids, first = reader.answer_ids(changed, answer)
        waiting.append((row, column, reader.passage(changed, ids, first)))
        if sum(len(p.input_ids) for _, _, p in waiting) >= PACKED:
            flush()
    if waiting:
        flush()
    return lost


def _shares(weights: np.ndarray) -> np.ndarray:
    """Rows that sum to 1; a row of zeros stays."""
    whole = weights.sum(-1, keepdims=True)
    return np.divide(weights, whole, out=np.zeros_like(weights), where=whole > 0)


def _maps(
    shown: Sequence[tuple[Image.Image, Places, int]],
    weights: np.ndarray,
    hidden: Sequence[np.ndarray | None],
) -> tuple[PictureMap, ...]:
    maps, first = [], 0
    for (image, where, tokens), lost in zip(shown, hidden, strict=True):
        if len(where.boxes) != tokens:
            raise ValueError(f"the picture has {tokens} tokens, its map {len(where.boxes)} places")
        own = weights[:, first : first + tokens]
        heat = where.paint(own, grid_for(image.size)).astype(np.float32)
        placeless = own[:, ~where.placed].sum(-1)
        padding = own @ (1 - where.inside()) - placeless
        maps.append(PictureMap(image, where, (first, first + tokens), heat, padding.clip(0), placeless, lost))
        first += tokens
    assert first == weights.shape[1]
    return tuple(maps)
