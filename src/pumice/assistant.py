"""An assistant: a model opened to answer, with the same processor that trained it.

Knows how questions become prompts and tokens become text. Does not know the command line.

Shapes: N image tokens, D decoder width, T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

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
from pumice.model.llava import Llava
from pumice.model.quantized import has_int8_kernel
from pumice.model.quantized import quantize as quantize_weights
from pumice.processor import Processor
from pumice.weights.load import find_device, open_model

if TYPE_CHECKING:
    from pumice.explain.explanation import Explanation
    from pumice.structured import JsonSchema

# Pictures whose image tokens are kept, so that asking again costs no vision tower; of pictures in tiles so
# many fewer that they take no more room.
REMEMBERED = 64
SLOTS = 32  # questions that `ask_many` has computed together


def load(
    name: str | PathLike[str] = "pumice-tiny",
    *,
    device: str | None = None,
    quantize: Literal["auto", "int8", "int4"] | None = "auto",
    dtype: torch.dtype | None = None,
    template: str | None = None,
    tower: str | None = None,
    base: str | None = None,
) -> Assistant:
    """Open a model to answer questions: a built-in one, a folder, a GGUF file or a name on the hub.

    device: the best one here when None. quantize: "int8" or "int4" keeps the decoder's weights in 8 or
    4 bits, None as they are, "auto" takes 8 bits on a CPU that has a kernel for them. dtype: of the
    decoder; when None, bf16 on CUDA and with fewer bits, fp16 on MPS, fp32 else. template, tower, base: what
    a model of others does not say or hold, as `weights.read.read_model` takes them. Raises InputError.
    """
    if quantize not in ("auto", "int8", "int4", None):
        raise InputError(f"quantize is {quantize!r}; use 'auto', 'int8', 'int4' or None")
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise InputError(f"dtype is {dtype!r}; use torch.float32, torch.bfloat16 or torch.float16")
    place = find_device(device)
    if quantize == "auto":
        quantize = "int8" if place.type == "cpu" and has_int8_kernel() else None
    if dtype is None:
        usual = {"cuda": torch.bfloat16, "mps": torch.float16}
        # The CPU's kernels for few bits take bf16; without them, most CPUs compute fp32 faster than bf16.
        dtype = usual.get(place.type, torch.bfloat16 if quantize else torch.float32)
    opened = open_model(str(name), device=place, dtype=dtype, template=template, tower=tower, base=base)
    if quantize:
        quantize_weights(opened.model.decoder, quantize)
    return Assistant(opened.model, opened.processor, opened.provenance)


class Reply(Iterator[str]):
    """An answer on its way: iterate over it for its pieces of text.

    finish: "stop" or "length" once it is complete ("cancelled" when it was closed before), None until then.
    tokens: how many were written so far. cached_tokens: of the prompt, those computed for earlier questions.
    """

    def __init__(
        self,
        engine: Engine,
        decode: Callable[[Sequence[int]], str],
        prompt: Prompt,
        ended: Callable[[], object] | None = None,
    ) -> None:
        self._engine, self._prompt, self._ended = engine, prompt, ended
        self._text = TextStream(decode, prompt.params.stop)
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # None comes last
        self._requests: list[Request] = []  # none before it begins, then one

    @property
    def finish(self) -> str | None:
        return self._text.finish

    @property
    def tokens(self) -> int:
        return self._text.tokens

    @property
    def cached_tokens(self) -> int:
        return self._text.cached_tokens

    def begin(self) -> Reply:
        """Hand the prompt to the engine; the first piece that is asked for does it too."""
        if not self._requests:
            # Nothing here refers to the reply: one that nobody wants any more is closed by `__del__`.
            engine, text, pieces, requests, ended = (
                self._engine, self._text, self._pieces, self._requests, self._ended,
            )  # fmt: skip

            def deliver(delta: Delta) -> None:
                if text.finish is not None:
                    return
                if piece := text.add(delta):
                    pieces.put(piece)
                if text.finish is not None:
                    for request in requests:
                        engine.cancel(request)
                    pieces.put(None)
                    if ended is not None:
                        ended()

            requests.append(engine.submit(self._prompt, deliver))
            if text.finish is not None:  # so fast that `requests` was empty when it ended
                engine.cancel(requests[0])
        return self

    def close(self) -> None:
        """Write no more of it."""
        for request in self._requests:
            self._engine.cancel(request)

    def __next__(self) -> str:
        self.begin()
        while not self._engine.started and self._pieces.empty():
            self._engine.step()
        piece = self._pieces.get()
        if piece is not None:
            return piece
        self._pieces.put(None)
        if self._text.error is not None:
            raise self._text.error
        raise StopIteration

    def __del__(self) -> None:
        self.close()


class Assistant:
    """Answers questions about pictures. Many in one go by `ask_many`."""

    def __init__(
        self, model: Llava, processor: Processor, provenance: Mapping[str, Any] | None = None
    ) -> None:
        self.model = model
        self.processor = processor
        self.provenance = dict(provenance or {})
        self._seen: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self.engine = Engine(model, slots=SLOTS)

    @property
    def generation(self) -> dict[str, Any]:
        """How this model's answers are drawn where nobody says otherwise, as fields of `SamplingParams`."""
        return dataclasses.asdict(self.model.config.generation)

    def ask(self, images: Any, question: str, **sampling: Any) -> str:
        """One answer about a picture, a list of them, or None: paths, bytes of files, or PIL images.

        sampling: fields of `SamplingParams`, before the model's own. Raises InputError on wrong input.
        """
        return "".join(self.stream(_question(images, question), **sampling))

    def stream(
        self,
        messages: Conversation | Sequence[Message | Mapping[str, Any]],
        *,
        schema: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Reply:
        """The answer to a conversation that ends with the user, as pieces of text while they are made.

        messages: {"role": ..., "content": text} or {"role": ..., "content": [{"type": "text", "text": ...},
        {"type": "image", "image": path, bytes or PIL image}, ...]}, Message objects, or a Conversation.
        schema: a JSON Schema that the answer follows as far as max_new_tokens lets it. Wrong input raises
        InputError now, not when the first piece is taken.
        """
        return self._reply(self.prompt(conversation_of(messages), schema=schema, **sampling))

    def ask_many(
        self,
        rows: Iterable[tuple[Any, str]],
        *,
        out: str | PathLike[str] | None = None,
        progress: Callable[[int], None] | None = None,
        slots: int = SLOTS,
        **sampling: Any,
    ) -> list[str | InputError]:
        """Answers to rows of (pictures as in `ask`, question), in order; many are computed together.

        What is wrong with a row stands in its answer's place. out: a file that gets one JSON line per row,
        {"images", "question", "answer" or "error", and the sampling as "asked"}, as it is answered; where it
        holds the first lines of the same rows, from a run that was stopped, these are not asked again.
        progress: told how many rows are done. Raises InputError when `out` is of other rows or another
        sampling, or in use.

        Questions about one picture should follow each other: the picture is then computed once.
        """
        from pumice.answers import AnswerFile

        if out is None:
            return self._report(self.ask_each(rows, slots=slots, **sampling), [], progress)
        given = list(rows)
        self._params(sampling)  # raises before the file is made
        with AnswerFile(out, given, sampling) as file:
            rest = self.ask_each(given[len(file.answers) :], slots=slots, **sampling)
            return self._report(map(file.add, rest), file.answers, progress)

    @staticmethod
    def _report(
        answers: Iterable[str | InputError],
        before: Iterable[str | InputError],
        progress: Callable[[int], None] | None,
    ) -> list[str | InputError]:
        done = list(before)
        for answer in answers:
            done.append(answer)
            if progress is not None:
                progress(len(done))
        return done

    def ask_each(
        self, rows: Iterable[tuple[Any, str]], *, slots: int = SLOTS, **sampling: Any
    ) -> Iterator[str | InputError]:
        """`ask_many` as an iterator: rows are taken as they are needed, `slots` of them computed together."""
        if slots < 1:
            raise InputError(f"slots is {slots}; at least one question must be answered at a time")
        return self._each(rows, slots, self._params(sampling))

    def _each(
        self, rows: Iterable[tuple[Any, str]], slots: int, params: SamplingParams
    ) -> Iterator[str | InputError]:
        replies: deque[Reply | InputError] = deque()  # of the rows taken and not given yet, in order
        free = threading.Semaphore(slots)
        try:
            for number, row in enumerate(rows, 1):
                try:
                    if not isinstance(row, list | tuple) or len(row) != 2:
                        raise InputError(f"row {number} is {row!r}; give (pictures, question)")
                    prompt = self._prompt(_question(*row), params)
                except InputError as error:
                    replies.append(error)
                else:
                    while not free.acquire(blocking=self.engine.started):
                        self.engine.step()
                    replies.append(self._reply(prompt, free.release).begin())
                while replies and _is_done(replies[0]):
                    yield _outcome(replies.popleft())
            while replies:
                yield _outcome(replies.popleft())
        finally:
            for reply in replies:
                if isinstance(reply, Reply):
                    reply.close()

    def _reply(self, prompt: Prompt, ended: Callable[[], object] | None = None) -> Reply:
        return Reply(self.engine, self.processor.tokenizer.decode, prompt, ended)

    def prompt(
        self, conversation: Conversation, *, schema: Mapping[str, Any] | None = None, **sampling: Any
    ) -> Prompt:
        """What the engine needs to answer a conversation, as `stream` is asked. Raises InputError."""
        prompt = self._prompt(conversation, self._params(sampling))
        return prompt if schema is None else dataclasses.replace(prompt, constraint=self.json(schema))

    def json(self, schema: Mapping[str, Any] | None) -> JsonSchema:
        """What holds an answer to a JSON Schema, or to any JSON object; costs a moment, so keep it."""
        from pumice.structured import JsonSchema

        config = self.model.config
        return JsonSchema(self.processor.tokenizer, schema, config.decoder.vocab_size, config.stop_token_ids)

    @torch.inference_mode()
    def logits(self, images: Any, prompt: str) -> Tensor:
        """Logits (T, V) in fp32 of every position of the rendered question, without a cache."""
        made = self.prompt(_question(images, prompt))
        hidden = self.model(made.input_ids.to(self.model.device)[None], made.look())
        return self.model.decoder.logits(hidden)[0].float()

    def explain(self, images: Any, question: str, answer: str | None = None, **options: Any) -> Explanation:
        """Where each word of an answer looked in the pictures, and whether they mattered, as plain arrays.

        images: as in `ask`, at least one. answer: its text; the model's own when None. options: of
        `pumice.explain.explanation.explain`, and fields of `SamplingParams`. Raises InputError.
        """
        from pumice.explain.explanation import explain

        return explain(self, _question(images, question), answer, **options)

    def _params(self, sampling: Mapping[str, Any]) -> SamplingParams:
        """The caller's options, else the model's, and the template's end of an answer where that is text."""
        params = SamplingParams(**{**self.generation, **sampling})
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


def _is_done(reply: Reply | InputError) -> bool:
    return isinstance(reply, InputError) or reply.finish is not None


def _outcome(reply: Reply | InputError) -> str | InputError:
    if isinstance(reply, InputError):
        return reply
    try:
        return "".join(reply)
    except InputError as error:
        return error


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


def conversation_of(messages: Conversation | Sequence[Message | Mapping[str, Any]]) -> Conversation:
    """Messages in any form that `Assistant.stream` takes. Raises InputError."""
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
