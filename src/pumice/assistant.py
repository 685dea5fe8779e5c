"""An assistant: a model opened to answer, with the same processor that trained it.

Knows how questions become prompts and tokens become text. Does not know the command line.

Shapes: N image tokens, D decoder width, T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pumice.conversation import Conversation, ImagePart, Message, user_message
from pumice.engine.detokenize import Detokenizer
from pumice.engine.generate import Answer, Prompt, check_room, generate
from pumice.engine.sampling import SamplingParams
from pumice.errors import InputError
from pumice.geometry import Layout
from pumice.images import image_key
from pumice.model.adapters import has_int8_kernel, quantize_int8
from pumice.model.llava import Llava
from pumice.processor import Processor
from pumice.weights.load import find_device, open_model

if TYPE_CHECKING:
    from pumice.explain.explanation import Explanation

# Pictures whose image tokens are kept, so that asking again costs no vision tower; of pictures in tiles so
# many fewer that they take no more room.
REMEMBERED = 64


def load(
    name: str | PathLike[str] = "pumice-tiny",
    *,
    device: str | None = None,
    quantize: Literal["auto", "int8"] | None = "auto",
    dtype: torch.dtype | None = None,
) -> Assistant:
    """Open a built-in model or a model folder to answer questions.

    device: the best one here when None. quantize: "int8" keeps the decoder's weights in 8 bits, None
    keeps them as they are, "auto" takes 8 bits on a CPU that has a kernel for them. dtype: of the
    decoder; when None, bf16 on CUDA and with int8, fp16 on MPS, fp32 else. Raises InputError.
    """
    if quantize not in ("auto", "int8", None):
        raise InputError(f"quantize is {quantize!r}; use 'auto', 'int8' or None")
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise InputError(f"dtype is {dtype!r}; use torch.float32, torch.bfloat16 or torch.float16")
    place = find_device(device)
    int8 = quantize == "int8" or (quantize == "auto" and place.type == "cpu" and has_int8_kernel())
    if dtype is None:
        usual = {"cuda": torch.bfloat16, "mps": torch.float16}
        # The CPU's int8 kernel takes bf16; without it, most CPUs compute fp32 faster than bf16.
        dtype = usual.get(place.type, torch.bfloat16 if int8 else torch.float32)
    opened = open_model(str(name), device=place, dtype=dtype)
    if int8:
        quantize_int8(opened.model.decoder)
    return Assistant(opened.model, opened.processor, opened.provenance)


class Reply(Iterator[str]):
    """An answer on its way: iterate over it for its pieces of text.

    finish: "stop" or "length" once it is complete, None before. tokens: how many were written so far.
    """

    def __init__(self, model: Llava, processor: Processor, prompt: Prompt) -> None:
        self.finish: str | None = None
        self.tokens = 0
        self._text = Detokenizer(processor.tokenizer.decode, prompt.params.stop)
        self._pieces = self._run(generate(model, [prompt]))

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self, events: Iterator[tuple[Answer, int | None]]) -> Iterator[str]:
        for answer, token in events:
            self.tokens += token is not None
            if piece := _piece(self._text, answer, token):
                yield piece
            self.finish = answer.finish


def _piece(text: Detokenizer, answer: Answer, token: int | None) -> str:
    """The text that one event of `generate` makes certain; ends the answer at a stop string."""
    piece = text.finish() if token is None else text.add(token)
    if text.stopped:
        answer.end()
    return piece


class Assistant:
    """Answers questions about pictures. One answer at a time; several in one go by `ask_batch`."""

    def __init__(
        self, model: Llava, processor: Processor, provenance: Mapping[str, Any] | None = None
    ) -> None:
        self.model = model
        self.processor = processor
        self.provenance = dict(provenance or {})
        self._seen: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def ask(self, images: Any, question: str, **sampling: Any) -> str:
        """One answer about a picture, a list of them, or None: paths, bytes of files, or PIL images.

        sampling: fields of `SamplingParams`. Raises InputError on wrong input.
        """
        return "".join(self.stream(_question(images, question), **sampling))

    def stream(
        self, messages: Conversation | Sequence[Message | Mapping[str, Any]], **sampling: Any
    ) -> Reply:
        """The answer to a conversation that ends with the user, as pieces of text while they are made.

        messages: {"role": ..., "content": text} or {"role": ..., "content": [{"type": "text", "text": ...},
        {"type": "image", "image": path, bytes or PIL image}, ...]}, Message objects, or a Conversation.
        Wrong input raises InputError now, not when the first piece is taken.
        """
        return Reply(self.model, self.processor, self.prompt(_conversation(messages), **sampling))

    def ask_batch(
        self, rows: Iterable[tuple[Any, str]], *, slots: int = 8, **sampling: Any
    ) -> Iterator[str | InputError]:
        """Answers to rows of (pictures as in `ask`, question), in order.

        What is wrong with a row stands in its answer's place. Rows are taken as they are needed and up
        to `slots` of them decoded together.
        """
        if slots < 1:
            raise InputError(f"slots is {slots}; at least one question must be answered at a time")
        params = self._params(sampling)
        results: dict[int, str | InputError] = {}
        numbers: list[int] = []  # of the rows that became prompts

        def prompts() -> Iterator[Prompt]:
            for number, row in enumerate(rows):
                try:
                    if not isinstance(row, list | tuple) or len(row) != 2:
                        raise InputError(f"row {number + 1} is {row!r}; give (pictures, question)")
                    images, question = row
                    prompt = self._prompt(_question(images, question), params)
                except InputError as error:
                    results[number] = error
                else:
                    numbers.append(number)
                    yield prompt

        texts: dict[int, Detokenizer] = {}
        pieces: dict[int, str] = {}
        following = 0
        for answer, token in generate(self.model, prompts(), slots=slots):
            number = numbers[answer.index]
            if number not in texts:
                texts[number] = Detokenizer(self.processor.tokenizer.decode, params.stop)
            pieces[number] = pieces.get(number, "") + _piece(texts[number], answer, token)
            if token is None:
                results[number] = pieces.pop(number)
                del texts[number]
            while following in results:
                yield results.pop(following)
                following += 1
        while following in results:
            yield results.pop(following)
            following += 1

    def prompt(self, conversation: Conversation, **sampling: Any) -> Prompt:
        """What the engine needs to answer a conversation. Raises InputError."""
        return self._prompt(conversation, self._params(sampling))

    @torch.inference_mode()
    def logits(self, images: Any, prompt: str) -> Tensor:
        """Logits (T, V) in fp32 of every position of the rendered question, without a cache."""
        made = self.prompt(_question(images, prompt))
        hidden = self.model(made.input_ids.to(self.model.device)[None], made.image_tokens)
        return self.model.decoder.logits(hidden)[0].float()

    def explain(self, images: Any, question: str, answer: str | None = None, **options: Any) -> Explanation:
        """Where each word of an answer looked in the pictures, and whether they mattered, as plain arrays.

        images: as in `ask`, at least one. answer: its text; the model's own when None. options: of
        `pumice.explain.explanation.explain`, and fields of `SamplingParams`. Raises InputError.
        """
        from pumice.explain.explanation import explain

        return explain(self, _question(images, question), answer, **options)

    def _params(self, sampling: Mapping[str, Any]) -> SamplingParams:
        """The caller's options, and the template's own end of an answer where that is text (v0's `###`)."""
        params = SamplingParams(**sampling)
        template = self.processor.template
        if self.processor.tokenizer.stops(template):
            return params
        return dataclasses.replace(params, stop=(*params.stop, template.stop))

    def _prompt(self, conversation: Conversation, params: SamplingParams) -> Prompt:
        sample = self.processor.prompt(conversation)
        shown = zip(sample.images, sample.layouts, strict=True)
        tokens = [self._image_tokens(image, layout) for image, layout in shown]
        made = Prompt(torch.from_numpy(sample.input_ids), torch.cat(tokens) if tokens else None, params)
        check_room(self.model, made)
        return made

    @torch.inference_mode()
    def _image_tokens(self, image: ImagePart, layout: Layout) -> Tensor:
        """Image tokens (N, D) of one picture; those of the pictures seen last are remembered."""
        key = image_key(image.source)
        with self._lock:
            if key in self._seen:
                self._seen.move_to_end(key)
                return self._seen[key]
        pixels = torch.from_numpy(self.processor.pixels((image,)))
        tokens = self.model.encode(pixels, (layout,)).flatten(0, -2)
        with self._lock:
            self._seen[key] = tokens
            room = REMEMBERED * self.model.config.image_tokens
            while len(self._seen) > 1 and sum(map(len, self._seen.values())) > room:
                self._seen.popitem(last=False)
        return tokens


def _question(images: Any, question: str) -> Conversation:
    if images is None:
        given: Sequence[Any] = ()
    else:
        given = images if isinstance(images, list | tuple) else [images]
    if not isinstance(question, str):
        raise InputError(f"the question is {question!r}; give text")
    if not question.strip():
        raise InputError("the question is empty; say what you want to know")
    return Conversation((user_message(question, given),))


def _conversation(messages: Conversation | Sequence[Message | Mapping[str, Any]]) -> Conversation:
    if isinstance(messages, Conversation):
        return messages
    if isinstance(messages, str | Mapping) or not all(isinstance(m, Message | Mapping) for m in messages):
        raise InputError("messages must be a list of {'role': ..., 'content': ...}, or a Conversation")
    return Conversation(tuple(_message(m, number) for number, m in enumerate(messages, 1)))


def _message(value: Message | Mapping[str, Any], number: int) -> Message:
    if isinstance(value, Message):
        return value
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str):
        raise InputError(f"message {number} has no 'role'; write 'user', 'assistant' or 'system'")
    if isinstance(content, str):
        return user_message(content) if role == "user" else Message(role, (content,))
    if not isinstance(content, list | tuple):
        raise InputError(f"message {number} has no 'content'; write text or a list of parts")
    parts: list[str | ImagePart] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif kind == "image" and part.get("image") is not None:
            parts.append(ImagePart(part["image"]))
        else:
            raise InputError(
                f"message {number}: unknown part {part!r}; write {{'type': 'text', 'text': ...}} "
                "or {'type': 'image', 'image': ...}"
            )
    return Message(role, tuple(parts))
