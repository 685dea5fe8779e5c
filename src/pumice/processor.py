"""Turn a conversation into a Sample: token ids, labels and images, for training and serving alike.

Shapes: T tokens, M images, P tiles (one per image, more under anyres), S pixels on a side.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pumice.boxes import box_map, write_boxes
from pumice.capability import CHAT, IMAGE, MODE_FIELDS, MODE_MARKS, MODE_VIDEO, PICTURED, Capability, fields
from pumice.config import IMAGE_TOKEN, TILED, ChatFormat, ImagePolicy, ModelConfig
from pumice.conversation import Conversation, ImagePart, Video
from pumice.errors import ContextOverflow, InputError, counted
from pumice.geometry import Layout, frame_layout, single_tile_layout, tile_layout
from pumice.images import image_key, image_size, open_image, read_image, to_tiles
from pumice.media import TileMarks, VideoPolicy
from pumice.templates import OWN, Plain, Span, Spans, get_template
from pumice.tokens import IGNORE, Tokenizer, encode
from pumice.video import show_videos

_LOG = logging.getLogger(__name__)
NO_TOWER = (
    "this model is a language model without a vision tower; ask it without pictures, or give the mmproj file "
    "of a LLaVA in GGUF with --mmproj"
)
CAPABILITY = Capability(
    "the processor",
    {
        ImagePolicy: fields(IMAGE),
        ChatFormat: fields(f"{CHAT} {PICTURED}"),
        VideoPolicy: fields("max_frames fps longest_edge timestamps pool average"),
        TileMarks: fields("tile row between whole end number"),
    },
)


def check_used(config: ModelConfig) -> None:
    """Raise InputError on a field that is set, and that nothing reads beside the others of this config."""
    mode, chat, video = config.image.mode, config.chat, config.video
    used = Capability(
        f"the image mode {mode!r}",
        {
            ImagePolicy: fields(MODE_FIELDS[mode]),
            TileMarks: fields(MODE_MARKS[mode]),
            VideoPolicy: fields(MODE_VIDEO[mode]),
        },
    )
    for part in (config.image, config.marks, video):
        if part is not None:
            used.check(part)
    if config.marks is not None and not MODE_MARKS[mode]:  # empty ones, too, say that tiles are apart
        raise InputError(f"the image mode {mode!r} joins its tiles and has no marks; leave `marks` out")
    if chat is None:
        return
    if config.template != OWN:
        raise InputError(
            f"the template is {config.template!r}, which does not use the fields of `chat`; name {OWN!r}"
        )
    if chat.system is None:  # nothing that stands inside or after a system message has a place
        without = fields(f"{CHAT} {PICTURED}")
        for name in ("default_system", "system_in_user", "tools"):
            del without[name]
        Capability("a chat format without `system`", {ChatFormat: without}).check(chat)
    if chat.shared_line and not chat.image_line:
        raise InputError("chat.shared_line is of a format whose pictures have lines; set image_line")
    if unknown := set(chat.trim) - {"system", "user", "assistant"}:
        raise InputError(f"chat.trim names {min(unknown)!r}; the roles are system, user and assistant")


@dataclass(frozen=True)
class Sample:
    """Ids, labels and pictures of one conversation.

    input_ids (T,) int64 with IMAGE_TOKEN placeholders; labels (T,) int64, IGNORE where not
    supervised: labels[t] is input_ids[t], which the model predicts from the tokens before t.
    """

    id: str
    input_ids: np.ndarray
    labels: np.ndarray
    images: tuple[ImagePart, ...]
    layouts: tuple[Layout, ...]  # of each picture: its number of placeholders, and its tiles

    @property
    def supervised(self) -> int:
        return int((self.labels != IGNORE).sum())


def cut(sample: Sample, limit: int) -> Sample:
    """Return the sample's first `limit` tokens, ended before an image that would be cut."""
    end, image_count = limit, 0
    placeholders = np.flatnonzero(sample.input_ids == IMAGE_TOKEN)
    for layout in sample.layouts:
        own_placeholders, placeholders = placeholders[: layout.tokens], placeholders[layout.tokens :]
        if own_placeholders[-1] >= end:
            end = min(end, int(own_placeholders[0]))
            break
        image_count += 1
    return Sample(
        sample.id,
        sample.input_ids[:end],
        sample.labels[:end],
        sample.images[:image_count],
        sample.layouts[:image_count],
    )


def _frames(conversation: Conversation, shown: Conversation) -> int:
    """Return the number of frames in a conversation as it is shown, of which the videos became frames."""
    return len(shown.images) - sum(not isinstance(image.source, Video) for image in conversation.images)


class Processor:
    """Prepares input as a checkpoint needs it: with its template, tokenizer and image policy."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, *, truncate: bool = False) -> None:
        """truncate: cut training samples that exceed the context instead of refusing them."""
        for part in (config.image, config.chat, config.video, config.marks):
            if part is not None:
                CAPABILITY.check(part)
        check_used(config)
        self.config = config
        self.truncate = truncate
        self._told = False  # that frames are shown as pictures
        self.tokenizer = tokenizer
        self.template = get_template(config.template, config.chat)
        tokenizer.check_rows(config.decoder.vocab_size)
        bos = () if config.bos_token_id is None else (config.bos_token_id,)
        for number in (*config.stop_token_ids, *bos):
            if not 0 <= number < config.decoder.vocab_size:
                rows = config.decoder.vocab_size
                raise InputError(f"the config names the token {number}, the embedding has only {rows} rows")
        if config.marks is not None:
            self._check_marks(config.marks)
        for token in config.image_wrap or ():
            if token not in tokenizer.special:
                raise InputError(f"image_wrap names {token!r}, which is no special token of the tokenizer")

    def training_sample(self, conversation: Conversation, *, mirror: bool = False) -> Sample:
        """An answered conversation with its labels. InputError when nothing would be supervised.

        mirror: its pictures will be shown flipped left to right, so its boxes are written so.
        """
        conversation = self.with_boxes(conversation.check(answered=True), mirror=mirror)
        shown = self.with_frames(conversation)
        sample = self._sample(shown, generate=False, frames=_frames(conversation, shown))
        limit = self.config.decoder.context
        if self.truncate and len(sample.input_ids) > limit:
            sample = cut(sample, limit)
            if not sample.supervised:
                raise InputError(
                    f"conversation {conversation.id!r}: nothing is supervised in its first {limit} tokens"
                )
        if not sample.supervised:
            raise InputError(f"conversation {conversation.id!r}: nothing is supervised by its template")
        return sample

    def with_boxes(self, conversation: Conversation, *, mirror: bool = False) -> Conversation:
        """Return a row with its names and boxes in its texts, as the model reads and writes them.

        mirror: its pictures are shown flipped left to right. Raises InputError where a picture cannot be
        measured, or a box is not in it.
        """
        if conversation.objects is None:
            return conversation
        images = conversation.images
        sizes = [image_size(image.source) for image in images]
        return write_boxes(
            conversation, [box_map(self.config, size, len(images), mirror=mirror) for size in sizes]
        )

    def prompt(self, conversation: Conversation, *, continued: bool = False) -> Sample:
        """A conversation that ends in a question, up to where the model's answer begins.

        continued: it ends in the beginning of an answer instead, which the model continues.
        The sample's pictures are read: a file that is replaced afterwards changes nothing.
        """
        conversation = conversation.check(answered=False, continued=continued)
        shown = self.with_frames(conversation)
        frames = _frames(conversation, shown)
        sample = self._sample(shown.with_sources(read_image), generate=True, frames=frames)
        if not len(sample.input_ids):
            raise InputError(f"the template {self.template.name!r} sees pictures only; show one")
        return sample

    def with_frames(self, conversation: Conversation) -> Conversation:
        """Return the conversation with the frames of each video in its place.

        If the model was not trained on videos, they are pictures, and a note says so once.
        """
        if not any(isinstance(image.source, Video) for image in conversation.images):
            return conversation
        if self.config.video is None and not self._told:
            self._told = True
            _LOG.warning("the model was not trained on videos: their frames are shown as pictures")
        return show_videos(conversation, self.config.video)

    @property
    def answer_prefix(self) -> str:
        """What the model may write before an answer's text, and nobody should read; "" if decoding drops it.

        That is what the template has there, or else a blank. LLaVA's own code strips answers, too.
        """
        if isinstance(self.template, Plain) or self.tokenizer.drops_space:
            return ""
        return self.template.chat.answer[0] or " "

    def pieces(self, conversation: Conversation) -> list[str | ImagePart]:
        """Return the text of a prompt as the template writes it, cut where its pictures stand."""
        pieces: list[str | ImagePart] = [""]
        for span in self._wrap(self.template.render(conversation.check(answered=False), generate=True)):
            if isinstance(span, ImagePart):
                pieces += [span, ""]
            else:
                pieces[-1] = f"{pieces[-1]}{span.text}"
        return pieces

    def _sample(self, conversation: Conversation, *, generate: bool, frames: int) -> Sample:
        """frames: how many of the conversation's pictures are those of videos."""
        spans = self.template.render(conversation, generate=generate)
        images = tuple(span for span in spans if isinstance(span, ImagePart))
        if images and self.config.vision.kind == "none":
            raise InputError(NO_TOWER)
        layouts = self.layouts(images)
        spans, counts = self._marked(spans, layouts)
        if generate or not self.truncate:
            texts = [span.text for span in spans if not isinstance(span, ImagePart)]
            self.tokenizer.check_length(texts, self.config.decoder.context, "the conversation")
        input_ids, labels = encode(self._wrap(spans), self.tokenizer, counts, self.config.bos_token_id)
        limit = self.config.decoder.context
        if len(input_ids) > limit and (generate or not self.truncate):
            name = f"conversation {conversation.id!r}" if conversation.id else "the conversation"
            message = f"{name} takes {len(input_ids)} tokens, the model's context is {limit}"
            if frames:  # beside which the text is short
                fitting = frames * limit // len(input_ids)
                message += f"; about {counted(fitting, 'frame', 'fit', of=frames)}: show fewer (--frames)"
            raise ContextOverflow(message, len(input_ids), limit)
        ids = np.array(input_ids, np.int64)
        return Sample(conversation.id, ids, np.array(labels, np.int64), images, layouts)

    def _wrap(self, spans: Spans) -> Spans:
        """Return the spans with `image_wrap` around each image, as in LLaVA 1.0."""
        if self.config.image_wrap is None:
            return spans
        before, after = (Span(token, control=True) for token in self.config.image_wrap)
        wrapped: Spans = []
        for span in spans:
            wrapped += [before, span, after] if isinstance(span, ImagePart) else [span]
        return wrapped

    def _check_marks(self, marks: TileMarks) -> None:
        """Raise InputError unless each mark that looks like a special token is one of the tokenizer's."""
        longest = -(-self.config.image.longest_edge // self.config.vision.image_size)
        tiles = [
            marks.tile.format(row=row, column=column)
            for row in range(1, longest + 1)
            for column in range(1, longest + 1)
        ]
        for token in re.findall(r"<[^<>\s:]+>", "".join((*tiles, marks.whole, marks.end))):
            if token not in self.tokenizer.special:
                raise InputError(f"marks names {token!r}, which is no special token of the tokenizer")

    def _marked(self, spans: Spans, layouts: Sequence[Layout]) -> tuple[Spans, list[int]]:
        """Return the spans with the marks of each image, and the number of tokens of each image in them.

        With marks an image stands there once for each of its tiles, in the order of `to_tiles`.
        """
        marks = self.config.marks
        if marks is None:
            return spans, [layout.tokens for layout in layouts]
        marked: Spans = []
        counts: list[int] = []
        numbers = itertools.count()
        for span in spans:
            if not isinstance(span, ImagePart):
                marked.append(span)
                continue
            layout = layouts[number := next(numbers)]
            counts += [layout.base] * layout.tiles
            if len(layouts) > 1:
                marked.append(Span(marks.number.format(number=number)))
            whole: Spans = [Span(marks.whole, control=True), span]
            tiles: Spans = []
            for row in range(1, layout.rows + 1):
                for column in range(1, layout.columns + 1):
                    tiles += [Span(marks.tile.format(row=row, column=column), control=True), span]
                tiles.append(Span(marks.row, control=True))
            if tiles and self.config.image.mode == "split":
                marked += [*tiles, Span(marks.between, control=True), *whole]
            else:
                marked += [*whole, *tiles]
            marked.append(Span(marks.end, control=True))
        return marked, counts

    def layouts(self, images: Sequence[ImagePart]) -> tuple[Layout, ...]:
        """Return the layout of every image of one conversation, in order.

        It depends on the number of pictures (a video's frames are none) and, where images become tiles, on
        each size, so their headers are read.
        """
        tiled = self.config.image.uses_tiles(sum(not image.frame for image in images))
        return tuple(self._layout(image, tiled) for image in images)

    def _layout(self, image: ImagePart, tiled: bool) -> Layout:
        if image.frame:
            return frame_layout(self.config, image.frame == "last")
        if tiled:
            return tile_layout(self.config, image_size(image.source))
        return single_tile_layout(self.config)

    def key(self, image: ImagePart, layout: Layout, *, mirror: bool = False) -> str:
        """Return a cache key for the tower's input: the same image in other tiles has another key."""
        one_tile = self.config.image.mode in TILED and layout.tiles == 1
        shown = f"-{image.frame}" if image.frame else "-square" * one_tile
        return image_key(image.source) + shown + "-mirror" * mirror

    def _policy(self, image: ImagePart) -> ImagePolicy:
        """Return how one image becomes pixels: a video's frame is squashed, or cropped."""
        video = self.config.video
        if not image.frame or video is None:
            return self.config.image
        mode = "crop" if video.average else "squash"
        return replace(self.config.image, mode=mode, longest_edge=video.longest_edge)

    def pixels(
        self, images: Sequence[ImagePart], layouts: Sequence[Layout], *, mirror: bool = False
    ) -> np.ndarray:
        """Return the tiles of images, (P, 3, S, S) float32, by the checkpoint's image policy.

        layouts: of these images, from `layouts` of the complete conversation. mirror: flip left to right.
        """
        size = self.config.vision.image_size
        tiles = [
            to_tiles(
                open_image(image.source), size, self._policy(image), tiles=layout.tiles > 1, mirror=mirror
            )
            for image, layout in zip(images, layouts, strict=True)
        ]
        if len(tiles) == 1:  # most rows show one picture, which needs no copy
            return tiles[0]
        return np.concatenate(tiles) if tiles else np.zeros((0, 3, size, size), np.float32)
