"""An assistant: a model opened to answer, with the same processor that trained it.

Knows how questions become prompts and tokens become text. Does not know the command line.

Shapes: N image tokens, D decoder width, T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor

from pumice.conversation import Conversation, ImagePart, Message, user_message
from pumice.engine.engine import Engine
from pumice.engine.generate import Picture, Prompt, check_room
from pumice.engine.requests import Delta, Request
from pumice.engine.sampling import SamplingParams
from pumice.engine.text import TextStream
from pumice.errors import InputError
from pumice.geometry import Layout
from pumice.images import image_key
from pumice.model.adapters import has_int8_kernel, quantize_int8
from pumice.model.llava import Llava
from pumice.processor import Processor
from pumice.weights.load import find_device, open_model

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
    cached_tokens: of the prompt, those that were computed for an earlier question.
    """

    def __init__(self, engine: Engine, processor: Processor, prompt: Prompt) -> None:
        self._engine, self._prompt = engine, prompt
        self._text = TextStream(processor.tokenizer.decode, prompt.params.stop)
        self._deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self._request: Request | None = None

    @property
    def finish(self) -> str | None:
        return self._text.finish

    @property
    def tokens(self) -> int:
        return self._text.tokens

    @property
    def cached_tokens(self) -> int:
        return self._text.cached_tokens

    def __next__(self) -> str:
        if self._request is None:
            self._request = self._engine.submit(self._prompt, self._deltas.put)
        while self._text.finish is None:
            piece = self._text.add(self._next_delta())
            if self._text.finish is not None:
                self._engine.cancel(self._request)
            if self._text.error is not None:
                raise self._text.error
            if piece:
                return piece
        raise StopIteration

    def _next_delta(self) -> Delta:
        while not self._engine.started and self._deltas.empty():
            self._engine.step()
        return self._deltas.get()

    def __del__(self) -> None:
        if self._request is not None:
            self._engine.cancel(self._request)


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
        self.engine = Engine(model)

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
        return Reply(self.engine, self.processor, self.prompt(_conversation(messages), **sampling))

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

        running: deque[tuple[int, Request, TextStream, list[str]]] = deque()
        following = 0
        waiting, exhausted = iter(prompts()), False
        while running or not exhausted:
            while len(running) < slots and not exhausted:
                prompt = next(waiting, None)
                if prompt is None:
                    exhausted = True
                    break
                running.append(self._collect(numbers[-1], prompt))
            if running and not self.engine.started:
                self.engine.step()
            for one in [one for one in running if one[2].finish is not None]:
                running.remove(one)
                number, _, text, pieces = one
                if text.error is not None and not isinstance(text.error, InputError):
                    raise text.error
                results[number] = text.error or "".join(pieces)
            while following in results:
                yield results.pop(following)
                following += 1

    def _collect(self, number: int, prompt: Prompt) -> tuple[int, Request, TextStream, list[str]]:
        text, pieces = TextStream(self.processor.tokenizer.decode, prompt.params.stop), list[str]()

        def deliver(delta: Delta) -> None:
            pieces.append(text.add(delta))
            if text.finish is not None and delta.finish is None:
                self.engine.cancel(request)

        request = self.engine.submit(prompt, deliver)
        return number, request, text, pieces

    def prompt(self, conversation: Conversation, **sampling: Any) -> Prompt:
        """What the engine needs to answer a conversation. Raises InputError."""
        return self._prompt(conversation, self._params(sampling))

    @torch.inference_mode()
    def logits(self, images: Any, prompt: str) -> Tensor:
        """Logits (T, V) in fp32 of every position of the rendered question, without a cache."""
        made = self.prompt(_question(images, prompt))
        hidden = self.model(made.input_ids.to(self.model.device)[None], made.look())
        return self.model.decoder.logits(hidden)[0].float()

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
        pictures = tuple(self._picture(image, layout) for image, layout in shown)
        made = Prompt(torch.from_numpy(sample.input_ids), None, params, pictures)
        check_room(self.model, made)
        return made

    def _picture(self, image: ImagePart, layout: Layout) -> Picture:
        """A picture that the tower sees when the engine asks for it; it is opened now, and wrong now."""
        key = image_key(image.source)
        with self._lock:
            tokens = self._seen.get(key)
            if tokens is not None:
                self._seen.move_to_end(key)
                return Picture(key, layout.tokens, lambda: tokens)
        pixels = torch.from_numpy(self.processor.pixels((image,)))

        @torch.inference_mode()
        def look() -> Tensor:
            with self._lock:
                if key in self._seen:
                    return self._seen[key]
            tokens = self.model.encode(pixels, (layout,)).flatten(0, -2)
            with self._lock:
                self._seen[key] = tokens
                room = REMEMBERED * self.model.config.image_tokens
                while len(self._seen) > 1 and sum(map(len, self._seen.values())) > room:
                    self._seen.popitem(last=False)
            return tokens

        return Picture(key, layout.tokens, look)


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
