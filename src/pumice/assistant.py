"""An assistant answers questions about images: it joins a model, its processor and an engine.

Shapes: N image tokens, D decoder width, T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pumice.boxes import FoundBox, box_map, draw
from pumice.config import ModelConfig
from pumice.config_json import as_stored
from pumice.conversation import Conversation, ImagePart, Message, question_message
from pumice.engine.engine import Engine
from pumice.engine.params import SamplingParams, check_form
from pumice.engine.reply import Reply, is_done, outcome
from pumice.engine.requests import Prompt, PromptImage, check_room
from pumice.engine.sizes import check_sizes
from pumice.engine.snapshot import Snapshot
from pumice.errors import InputError
from pumice.formats.load import check_bf16, find_device, name_of, open_model, usual_dtype
from pumice.geometry import Layout
from pumice.images import image_size, open_image, read_image
from pumice.jsonl import AnswerFile
from pumice.messages import join_messages, read_message
from pumice.model.llava import Llava
from pumice.processor import Processor
from pumice.stopping import check_stopped

if TYPE_CHECKING:
    from PIL import Image

    from pumice.engine.constraint import JsonSchema
    from pumice.explain.explanation import Explanation

_LOG = logging.getLogger(__name__)

# Image tokens of this many images are cached, so that the vision tower does not run again. Images of several
# tiles count for more, so that the memory stays the same.
CACHED_IMAGES = 64
SLOTS = 32  # questions that `ask_many` computes together
# The same where one person waits and sees how much of the prompt is read, which costs no time.
CHUNK_SHOWN = 128


def load(
    name: str | PathLike[str] = "pumice-tiny",
    *,
    device: str | None = None,
    quantize: Literal["auto", "int8", "int4"] | None = "auto",
    dtype: torch.dtype | None = None,
    template: str | None = None,
    tower: str | None = None,
    base: str | None = None,
    mmproj: str | PathLike[str] | None = None,
    cache_limit: float | None = None,
    slots: int = SLOTS,
    cache_tokens: int | None = None,
    chunk: int | None = None,
    memory_share: float | None = None,
) -> Assistant:
    """Open a model to answer questions: a built-in one, a folder, a GGUF file or a name on the hub.

    device: None chooses the best one of this machine. quantize: "int8" or "int4" stores the decoder's weights
    in 8 or 4 bits, None as they are; "auto" chooses 8 bits on a CPU that has a kernel for them. On a CPU that
    multiplies integers fast, a ViT's MLPs then get 8 bits too. dtype: of the decoder; None gives bf16 on CUDA
    (fp16 before Ampere), fp16 on MPS and fp32 on a CPU, where quantised decoders compute in fp32 whatever it
    is. template, tower, base, mmproj: what a model from elsewhere does not state or contain, as in
    `pumice.formats.read.read_model`. cache_limit: the GB that converted GGUF files may take in the cache;
    None: as $PUMICE_CACHE_LIMIT says. slots, cache_tokens, chunk, memory_share: the sizes of its
    engine, as in `Engine`. Raises InputError.
    """
    if quantize not in ("auto", "int8", "int4", None):
        raise InputError(f"quantize is {quantize!r}; use 'auto', 'int8', 'int4' or None")
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise InputError(f"dtype is {dtype!r}; use torch.float32, torch.bfloat16 or torch.float16")
    check_sizes(slots, cache_tokens, chunk)
    torch_device = find_device(device)
    if dtype is None:
        dtype = usual_dtype(torch_device)
    elif dtype == torch.bfloat16:
        check_bf16(torch_device, "leave dtype out, or use torch.float16")
    opened = open_model(
        str(name),
        device=torch_device,
        dtype=dtype,
        quantize=quantize,
        template=template,
        tower=tower,
        base=base,
        mmproj=mmproj,
        cache_limit=cache_limit,
        cache_tokens=cache_tokens,
    )
    return Assistant(
        opened.model,
        opened.processor,
        opened.provenance,
        slots=slots,
        cache_tokens=cache_tokens,
        chunk=chunk,
        memory_share=memory_share,
        name=name_of(name, opened.provenance),
    )


class Assistant:
    """Answers questions about pictures: one with `ask`, many with `ask_many`."""

    def __init__(
        self,
        model: Llava,
        processor: Processor,
        provenance: Mapping[str, Any] | None = None,
        *,
        slots: int = SLOTS,
        cache_tokens: int | None = None,
        chunk: int | None = None,
        memory_share: float | None = None,
        name: str = "model",
    ) -> None:
        """name: what users call the model. slots to memory_share: the sizes of the engine, as in `Engine`."""
        self.name = name
        self.model = model
        self.processor = processor
        self.provenance = dict(provenance or {})
        # By image key, least recently used first.
        self._image_tokens: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._snapshot = Snapshot(model)
        self._warned = False  # that a conversation has more images than the model was trained on
        self.engine = Engine(
            model, slots=slots, cache_tokens=cache_tokens, chunk=chunk, memory_share=memory_share
        )

    def forget(self) -> None:
        """Forget everything that was computed: image tokens, and the engine's prefix cache.

        Call it after weights, or what a hook computes, have changed. Other edits are noticed without it.
        """
        with self._lock:
            self._image_tokens.clear()
            self._snapshot = Snapshot(self.model)
        self.engine.forget()

    @property
    def generation(self) -> dict[str, Any]:
        """How this model's answers are sampled by default, as fields of `SamplingParams`."""
        # Without beams where there are none: a stopped batch of an earlier version goes on.
        return as_stored(self.model.config.generation)

    def ask(self, images: Any, question: str, **sampling: Any) -> str:
        """Return the answer to a question about pictures.

        images: one, a list of them, or None; each a path, the bytes of a file, or a PIL image.
        sampling: fields of `SamplingParams`; the model's own (`generation`) stand for those left out.
        Raises InputError on wrong input.
        """
        return "".join(self.stream(_question(images, question), **sampling))

    def stream(
        self,
        messages: Conversation | Sequence[Message | Mapping[str, Any]],
        *,
        schema: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Reply:
        """Return the answer to a conversation, as pieces of text while it is written.

        messages: {"role": ..., "content": text} or {"role": ..., "content": [{"type": "text", "text": ...},
        {"type": "image", "image": path, bytes or PIL image}, ...]}, Message objects, or a Conversation.
        The last message is the user's. schema: a JSON Schema that the answer follows, unless max_new_tokens
        cuts it off. Wrong input raises InputError at once, not when the first piece is taken.
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
        """Answer rows of (pictures as in `ask`, question), in order. Many are computed together.

        If a row is wrong, its answer is the InputError. out: a file that gets one JSON line per row,
        {"images", "question", "answer" or "error", and the sampling as "asked"}. If it already holds the
        first lines of the same rows, from a run that was stopped, these rows are not asked again. progress:
        called with the number of rows that are done. Raises InputError if `out` belongs to other rows or
        another sampling, or is in use.

        Put questions about the same picture next to each other, so that the picture is computed only once.
        """
        outcomes: list[str | InputError] = []
        with contextlib.ExitStack() as stack:
            if out is not None:
                rows = list(rows)
                self._params(sampling)  # raises before the file is created
                file = stack.enter_context(AnswerFile(out, rows, sampling))
                outcomes, rows = list(file.answers), rows[len(file.answers) :]
            for answer in self.ask_each(rows, slots=slots, **sampling):
                outcomes.append(answer if out is None else file.add(answer))
                if progress is not None:
                    progress(len(outcomes))
        return outcomes

    def ask_each(
        self, rows: Iterable[tuple[Any, str]], *, slots: int = SLOTS, **sampling: Any
    ) -> Iterator[str | InputError]:
        """Answer rows as in `ask_many`, as an iterator. Rows are taken when needed, `slots` at a time.

        An InputError among the rows, of one that could not be read, comes back in its place.
        """
        if slots < 1:
            raise InputError(f"slots is {slots}; at least one question must be answered at a time")
        return self._each(rows, slots, self._params(sampling))

    def _each(
        self, rows: Iterable[tuple[Any, str] | InputError], slots: int, params: SamplingParams
    ) -> Iterator[str | InputError]:
        replies: deque[Reply | InputError] = deque()  # of rows whose answers are not yielded yet, in order
        free_slots = threading.Semaphore(slots)
        try:
            for number, row in enumerate(rows, 1):
                try:
                    if isinstance(row, InputError):
                        raise row
                    if not isinstance(row, list | tuple) or len(row) != 2:
                        raise InputError(f"row {number} is {row!r}; give (pictures, question)")
                    prompt = self._prompt(_question(*row), params)
                except InputError as error:
                    replies.append(error)
                else:
                    # Wait for a free slot. Without the engine's thread, steps have to be made here.
                    while not free_slots.acquire(blocking=self.engine.started):
                        self.engine.step()
                    replies.append(self._reply(prompt, free_slots.release).begin())
                while replies and is_done(replies[0]):
                    yield outcome(replies.popleft())
            while replies:
                yield outcome(replies.popleft())
        finally:
            for reply in replies:
                if isinstance(reply, Reply):
                    reply.close()

    def _reply(self, prompt: Prompt, on_end: Callable[[], object] | None = None) -> Reply:
        return Reply(self.engine, self.processor.tokenizer.decode, prompt, on_end)

    def prompt(
        self,
        conversation: Conversation,
        *,
        schema: Mapping[str, Any] | None = None,
        continued: bool = False,
        **sampling: Any,
    ) -> Prompt:
        """Build the engine's prompt for a conversation; schema and sampling as in `stream`.

        continued: its last message is the beginning of the answer, which the model continues. Raises
        InputError.
        """
        prompt = self._prompt(conversation, self._params(sampling), continued)
        if schema is None:
            return prompt
        check_form(sampling, "a schema")
        return dataclasses.replace(prompt, constraint=self.json(schema))

    def json(self, schema: Mapping[str, Any] | None) -> JsonSchema:
        """Compile a JSON Schema, or None for any JSON object, to a constraint. Reuse it: this is slow."""
        from pumice.engine.constraint import JsonSchema

        config = self.model.config
        return JsonSchema(self.processor.tokenizer, schema, config.decoder.vocab_size, config.stop_token_ids)

    @torch.inference_mode()
    def logits(self, images: Any, prompt: str) -> Tensor:
        """Return the logits (T, V) in fp32 at every position of the rendered question, without a cache."""
        engine_prompt = self.prompt(_question(images, prompt))
        hidden = self.model(
            engine_prompt.input_ids.to(self.model.device)[None], engine_prompt.encode_images()
        )
        return self.model.decoder.logits(hidden)[0].float()

    def explain(self, images: Any, question: str, answer: str | None = None, **options: Any) -> Explanation:
        """Show where each word of an answer looked in the pictures, and whether they mattered, as plain
        arrays.

        images: as in `ask`, at least one. answer: its text; None for the model's own. options: of
        `pumice.explain.explanation.explain`, and fields of `SamplingParams`. Raises InputError.
        """
        return explain(self, _question(images, question), answer, **options)

    def boxes(self, image: Any, answer: str, *, images: int = 1) -> list[FoundBox]:
        """Return the boxes that an answer about a picture holds, in pixels of the upright picture.

        images: how many pictures the question showed, the last of which is `image`. Raises InputError where
        the picture cannot be measured.
        """
        return box_map(self.model.config, image_size(image), images).find(answer)

    def draw(self, image: Any, answer: str, *, images: int = 1) -> Image.Image:
        """Return the upright picture with the boxes of an answer; a notebook shows it. As in `boxes`."""
        found = self.boxes(image, answer, images=images)
        return draw(open_image(image), [(each.label, each.box) for each in found])

    def _params(self, sampling: Mapping[str, Any]) -> SamplingParams:
        """Return the caller's options, else the model's, with the template's stop text if it has one."""
        params = SamplingParams.of(SamplingParams.options(self.generation, sampling))
        template = self.processor.template
        if self.processor.tokenizer.stops(template):
            return params
        return dataclasses.replace(params, stop=(*params.stop, template.stop))

    def _prompt(self, conversation: Conversation, params: SamplingParams, continued: bool = False) -> Prompt:
        sample = self.processor.prompt(conversation, continued=continued)
        images = tuple(
            self._prompt_image(image, layout)
            for image, layout in zip(sample.images, sample.layouts, strict=True)
        )
        prefix = "" if continued else self.processor.answer_prefix
        ids, decode = torch.from_numpy(sample.input_ids), self.processor.tokenizer.decode
        prompt = Prompt(ids, None, params, images, prefix=prefix, decode=decode)
        check_room(self.model, prompt)
        self._warn_of_many_images(sum(not image.frame for image in sample.images))
        return prompt

    def _warn_of_many_images(self, count: int) -> None:
        """Log once if a conversation has more images than the model was trained on."""
        if (warning := too_many_images(self.model.config, count)) is not None:
            with self._lock:
                is_first, self._warned = not self._warned, True
            if is_first:
                _LOG.warning("%s", warning)

    def _prompt_image(self, image: ImagePart, layout: Layout) -> PromptImage:
        """Read an image now, so that a wrong one raises now. The tower runs only if the engine needs it."""
        check_stopped()
        key = self.processor.key(image, layout)
        if not self._snapshot.is_current():
            self.forget()
        with self._lock:
            tokens = self._image_tokens.get(key)
            if tokens is not None:
                self._image_tokens.move_to_end(key)
                return PromptImage(key, layout.tokens, lambda: tokens)
        pixels = torch.from_numpy(self.processor.pixels((image,), (layout,)))

        @torch.inference_mode()
        def encode() -> Tensor:
            # Another prompt may have encoded the same image since.
            with self._lock:
                if key in self._image_tokens:
                    return self._image_tokens[key]
            tokens = self.model.encode(pixels, (layout,)).flatten(0, -2)
            with self._lock:
                self._image_tokens[key] = tokens
                max_tokens = CACHED_IMAGES * self.model.config.image_tokens
                while len(self._image_tokens) > 1 and sum(map(len, self._image_tokens.values())) > max_tokens:
                    self._image_tokens.popitem(last=False)
            return tokens

        return PromptImage(key, layout.tokens, encode)


def explain(
    assistant: Assistant,
    conversation: Conversation,
    answer: str | None = None,
    **options: Any,
) -> Explanation:
    """Explain an answer to a conversation. `Assistant.explain` does this for one question.

    answer: its text; None for the assistant's own. options: as in `Assistant.explain`. Raises InputError.
    """
    from pumice.explain.explanation import explain as explain_answer

    method_options = {n: options.pop(n) for n in ("method", "layers", "occlusion") if n in options}

    # Read the files once, so that the pictures drawn are those asked about, even if a file is replaced.
    conversation = assistant.processor.with_frames(conversation).with_sources(read_image)

    def generate_answer() -> str:
        return "".join(assistant.stream(conversation, **options))

    return explain_answer(
        assistant.model,
        assistant.processor,
        conversation,
        generate_answer if answer is None else answer,
        lambda conversation: assistant.prompt(conversation).encode_images(),
        **method_options,
    )


def too_many_images(config: ModelConfig, count: int) -> str | None:
    """Return a warning if a conversation has more images than the model was trained on, else None."""
    most = most_pictures(config)
    if most is None or count <= most:
        return None
    limit = f"the model was trained on at most {most}"
    if config.trained_pictures is None:
        limit = "the model's folder does not say that it was trained on more than 1"
    return (
        f"the conversation has {count} pictures, and {limit}: answers may be poor; ask about fewer at a time"
    )


def most_pictures(config: ModelConfig) -> int | None:
    """Return how many pictures of a conversation the model knows from training; None if as many as fit."""
    if config.trained_pictures is None and (config.marks is not None or config.image.several == "square"):
        return None  # a model has marks or a policy for several images only if it was trained on several
    return max(1, config.trained_pictures or 1)


def _question(images: Any, question: str) -> Conversation:
    if images is None:
        sources: Sequence[Any] = ()
    else:
        sources = images if isinstance(images, list | tuple) else [images]
    if not isinstance(question, str):
        raise InputError(f"the question is {question!r}; give text")
    if not question.strip():
        raise InputError("the question is empty; say what you want to know")
    return Conversation((question_message(question, sources),))


def conversation_of(messages: Conversation | Sequence[Message | Mapping[str, Any]]) -> Conversation:
    """Turn messages in any form that `Assistant.stream` takes into a Conversation. Raises InputError."""
    if isinstance(messages, Conversation):
        return messages
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not is_list or not all(isinstance(m, Message | Mapping) for m in messages):
        raise InputError("messages must be a list of {'role': ..., 'content': ...}; ask takes a question")
    read = (m if isinstance(m, Message) else read_message(m, number) for number, m in enumerate(messages, 1))
    return Conversation(join_messages(read))
