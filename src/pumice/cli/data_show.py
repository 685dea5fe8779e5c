"""`pumice data show`: rows as the model sees them, and their pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from pumice.cli import options
from pumice.cli.source import SourceOptions
from pumice.errors import InputError, counted
from pumice.jsonl import print_json

if TYPE_CHECKING:
    from pumice.boxes import BoxMap
    from pumice.config import ModelConfig
    from pumice.conversation import Conversation
    from pumice.data.rows import ImageFinder, Row, Rows
    from pumice.geometry import Size
    from pumice.templates import Plain, Template
    from pumice.tokens import Tokenizer
    from pumice.train.recipe import Recipe

PAGE_ROWS = 100  # rows of a page, unless --rows says otherwise


@options.expand
def show(
    reading: SourceOptions,
    source: Annotated[
        str | None,
        Argument(
            help="Rows in any format: a file, a folder, a glob, hf://owner/name; the recipe's if not given.",
            metavar="SOURCE",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        Option(help="As this recipe's stage learns them: its model, template, image tokens and context."),
    ] = None,
    model: options.Model = "pumice-tiny",
    template: Annotated[
        str | None, Option(help="Another chat format than the model's: v1, plain, ...")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        Option(
            help="Not a model's but this tokenizer.json, SentencePiece tokenizer.model, folder or GGUF file.",
            metavar="PATH",
        ),
    ] = None,
    images: Annotated[
        Path | None, Option(help="Look the pictures up here; without it none is needed.")
    ] = None,
    rows: Annotated[int | None, Option(min=1, help="Show only so many rows of a source.")] = None,
    pictures: Annotated[bool, Option("--pictures", help="Draw the pictures in the terminal.")] = False,
    page: Annotated[
        Path | None, Option("--html", help="Write rows and pictures to this page instead.")
    ] = None,
    as_json: Annotated[
        bool, Option("--json", help="Print a list of {id, input_ids, labels}; a picture is -200.")
    ] = False,
) -> None:
    """Print rows as the model sees them: what it learns to write is green and in [+ +]."""
    from pumice.data.rows import ImageFinder

    # 1. The rows, where their pictures are, and how they become tokens: by the recipe, if there is one.
    sources = [] if source is None else [reading.open(source)]
    folders = [] if images is None else [images]
    encoding: RowEncoding | None = None
    if recipe is not None:
        if template is not None or tokenizer is not None or model != "pumice-tiny":
            raise InputError(
                "--recipe names the model and the template; leave --model, --template and --tokenizer out"
            )
        from pumice.train.batches import open_rows
        from pumice.train.recipe import load_recipe

        loaded = load_recipe(recipe)
        sources = sources or [open_rows(one) for one in loaded.data]
        folders = folders or loaded.pictures or [Path(".")]
        encoding = _learned(loaded)
    elif page is None:
        encoding = _seen(model, template, tokenizer)
    if not sources:
        raise InputError("there is nothing to show: give a file of rows, or --recipe")
    finder = ImageFinder(folders) if folders else None
    config = None if encoding is None else encoding.config
    # 2. A page shows rows as they are.
    if page is not None:
        if len(sources) > 1:
            raise InputError(f"--html writes a page of one source, the recipe has {len(sources)}; name one")
        _write_page(sources[0], rows or PAGE_ROWS, finder or ImageFinder("."), page, _box_maps(config))
        return
    assert encoding is not None  # only a page needs none
    # 3. Print tokens. A row that a recipe cannot use says why; without a recipe it ends the command.
    printed = []
    for opened in sources:
        for row in (opened[index] for index in range(min(len(opened), rows or len(opened)))):
            try:
                # Boxes are written by the sizes of their pictures.
                pictures_at = finder or (None if row.objects is None else ImageFinder("."))
                ids, labels = encoding.encode(row.conversation(pictures_at))
            except InputError as error:
                if recipe is None or as_json:
                    raise
                print(f"{row.id}: not learned: {error}\n")
                continue
            if as_json:
                printed.append({"id": row.id, "input_ids": ids, "labels": labels})
                continue
            if pictures:
                _draw(row, finder or ImageFinder("."), config)
            counted = _counted(ids, config) if recipe is None else ""
            print_row(row.id, ids, labels, encoding.tokenizer, counted)
    if as_json:
        print_json(printed)


@dataclasses.dataclass(frozen=True)
class RowEncoding:
    """How a row becomes (input_ids, labels). config: of the model, None for a tokenizer alone."""

    config: ModelConfig | None
    tokenizer: Tokenizer
    encode: Callable[[Conversation], tuple[list[int], list[int]]]


def _learned(recipe: Recipe) -> RowEncoding:
    """Return the encoding of a recipe's stage: with image tokens, and cut or refused at its context."""
    from pumice.train.shapes import processor_of

    processor = processor_of(recipe)

    def encode(conversation: Conversation) -> tuple[list[int], list[int]]:
        sample = processor.training_sample(conversation)
        return sample.input_ids.tolist(), sample.labels.tolist()

    return RowEncoding(processor.config, processor.tokenizer, encode)


def _seen(model: str, template: str | None, path: Path | None) -> RowEncoding:
    """Return the encoding of a model, or of the tokenizer at `path`, with one token for each picture."""
    from pumice.boxes import write_boxes
    from pumice.formats.read import read_model
    from pumice.images import image_size
    from pumice.processor import Processor
    from pumice.templates import OWN
    from pumice.tokens import Tokenizer
    from pumice.tokens import encode as encode_spans

    config = None
    if path is not None:
        chat_format, tokenizer, bos = _format(template or OWN, path)
    else:
        loaded = read_model(model)  # without its weights
        config = dataclasses.replace(loaded.config, template=template or loaded.config.template)
        processor = Processor(config, Tokenizer(loaded.tokenizer))
        chat_format, tokenizer, bos = processor.template, processor.tokenizer, config.bos_token_id

    def encode(conversation: Conversation) -> tuple[list[int], list[int]]:
        if conversation.objects is not None:
            box_map = _box_maps(config, len(conversation.images))
            conversation = write_boxes(
                conversation, [box_map(image_size(i.source)) for i in conversation.images]
            )
        ones = [1] * len(conversation.images)
        return encode_spans(chat_format.render(conversation), tokenizer, ones, bos)

    return RowEncoding(config, tokenizer, encode)


def _box_maps(config: ModelConfig | None, images: int = 1) -> Callable[[Size], BoxMap]:
    """Return how a model reads and writes boxes; without one, as LLaVA-1.5 does. images: of a row."""
    from pumice.boxes import box_map
    from pumice.data.preview import padded_map

    return padded_map if config is None else lambda size: box_map(config, size, images)


def _write_page(
    rows: Rows, count: int, finder: ImageFinder, page: Path, box_maps: Callable[[Size], BoxMap]
) -> None:
    from pumice.data.preview import write_page

    def read(index: int) -> Row | InputError:
        try:
            return rows[index]
        except InputError as error:
            return error

    shown = min(count, len(rows))
    write_page(((index + 1, read(index)) for index in range(shown)), finder, page, rows.label, box_maps)
    print(f"{page}: {counted(shown, 'row', of=len(rows))} ({rows.opened.form})")


def _draw(row: Row, finder: ImageFinder, config: ModelConfig | None) -> None:
    """Draw the pictures of a row with its boxes; say why one cannot be opened. config: of the model."""
    from rich.console import Console

    from pumice.data.images import open_pictures
    from pumice.data.preview import blocks, row_boxes

    console = Console(highlight=False)
    opened, complete = [], True
    for image in row.image:
        try:
            opened += open_pictures(row.find(image, finder))
        except InputError as error:
            console.print(str(error), markup=False)
            complete = False
    # Without one picture, which box belongs to which other is not known.
    box_map = _box_maps(config, len(opened))
    boxes = row_boxes(row, [image.size for image in opened], box_map) if complete else [[] for _ in opened]
    for picture, own_boxes in zip(opened, boxes, strict=True):
        console.print(blocks(picture, own_boxes))


def _format(template: str, path: Path) -> tuple[Template | Plain, Tokenizer, int | None]:
    """Return the template, the tokenizer and the id of the token that begins a row, if there is one."""
    from pumice.config import ModelConfig
    from pumice.formats.gguf.tokenizer import read_gguf_tokenizer
    from pumice.formats.text.read import TextSide
    from pumice.formats.text.tokenizer import read_tokenizer
    from pumice.storage.json_file import read_json
    from pumice.templates import OWN, get_template
    from pumice.tokens import Tokenizer

    side = TextSide(read_tokenizer(path, read_gguf_tokenizer))
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if "pumice_format" in config:  # a Pumice model folder
        model = ModelConfig.from_dict(config)
        chat_format = get_template(model.template if template == OWN else template, model.chat)
        bos = model.bos_token_id
    else:
        described, _ = side.chat_format(template, str(path))
        chat_format = get_template(described.template, described.chat)
        bos = side.bos_id(described.writes_bos)
    text_tokenizer = Tokenizer(side.tokenizer)
    # Raises InputError if the tokenizer lacks special tokens of the template.
    text_tokenizer.stops(chat_format)
    return chat_format, text_tokenizer, bos


def _counted(ids: list[int], config: ModelConfig | None) -> str:
    """Say how many tokens a row has in the model, where `ids` holds one placeholder for each picture."""
    from pumice.config import IMAGE_TOKEN

    if not (pictures := ids.count(IMAGE_TOKEN)):
        return ""
    if config is None:
        return " (a picture counts as one; `data check` counts its image tokens)"
    tiles = config.image.uses_tiles(pictures)  # whose number depends on the picture
    whole = len(ids) + pictures * (config.image_tokens - 1)
    return (
        f" (a picture counts as one; {'at least ' * tiles}{whole} with its image tokens, as in `data check`)"
    )


def print_row(
    row_id: str, ids: list[int], labels: list[int], tokenizer: Tokenizer, counted: str = ""
) -> None:
    """Print the tokens of a row as text: supervised ones green, pictures magenta, the others dim.

    counted: how the pictures are counted.
    """
    from rich.console import Console
    from rich.text import Text

    from pumice.config import IMAGE_TOKEN
    from pumice.tokens import IGNORE

    def decode(token_ids: list[int]) -> str:
        return tokenizer.backend.decode(token_ids, skip_special_tokens=False)

    supervised = sum(label != IGNORE for label in labels)
    text = Text(f"{row_id}: {len(ids)} tokens{counted}, {supervised} supervised\n", "bold")
    start = 0
    while start < len(ids):
        # A span is a run of tokens with the same colour.
        kind = (ids[start] == IMAGE_TOKEN, labels[start] != IGNORE)
        end = start + 1
        while end < len(ids) and (ids[end] == IMAGE_TOKEN, labels[end] != IGNORE) == kind:
            end += 1
        if kind[0]:
            text.append("[image]" if end == start + 1 else f"[image x {end - start}]", "magenta")
        elif kind[1]:
            text.append(f"[+{decode(ids[start:end])}+]", "green")
        else:
            text.append(decode(ids[start:end]), "dim")
        start = end
    Console(highlight=False, soft_wrap=True).print(text, end="\n\n")
