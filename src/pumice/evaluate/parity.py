"""Say whether two programs compute the same of one model, and where they part first.

A question goes through both. The first writes an answer; the second computes the probabilities of the same
tokens, once with its own tokens and image tokens, and once with the first one's. So each stage is compared
by itself: tokenizer, number of image tokens, tower with connector, decoder.

Shapes: N image tokens of all pictures, D decoder width, T tokens of the answer and one more, V vocabulary.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from pumice.assistant import Assistant
from pumice.chat_client import ChatEndpoint, ask_in_order, with_images, with_model
from pumice.config import IMAGE_TOKEN
from pumice.conversation import Conversation, ImagePart, question_message
from pumice.engine.generate import generate
from pumice.errors import InputError, counted
from pumice.evaluate.llama_cpp import PURPOSE, LlamaCpp
from pumice.formats.gguf.library import mtmd_library
from pumice.images import open_image
from pumice.processor import Processor

LIKELY = 10  # tokens whose log-probabilities are compared at each step: the first model's likeliest
# Of the image tokens' root mean square. Weights in fp16 move those of tiny random models by at most 0.0035.
TOWER_TOLERANCE = 0.01
STAGES = ("prompt", "tokenizer", "image tokens", "tower", "decoder", "answer")  # as they follow each other


@dataclass(frozen=True)
class CheckQuestion:
    """A question, with pictures or without."""

    text: str
    pictures: tuple[Path | bytes, ...] = ()

    @property
    def conversation(self) -> Conversation:
        return Conversation((question_message(self.text, self.pictures),))


@dataclass(frozen=True)
class Trace:
    """What one program computed of a question; None where it does not tell.

    ids: of the prompt, with IMAGE_TOKEN for each image token. length: of the prompt. image_tokens: (N, D).
    written: tokens of the answer, as text from a server. logprobs: (T, V), of all tokens. shared: the same
    from the other program's ids and image tokens. words: by text, the likeliest tokens at each step.
    """

    length: int
    written: tuple[Any, ...]
    ids: tuple[int, ...] | None = None
    image_tokens: Tensor | None = None
    logprobs: Tensor | None = None
    shared: Tensor | None = None
    words: tuple[Mapping[str, float], ...] = ()


@dataclass(frozen=True)
class CheckStage:
    """One stage of both programs: whether they agree (None: it cannot be seen), and in which numbers."""

    name: str
    same: bool | None
    says: str


class Program(Protocol):
    """What runs a model. `name` is for people."""

    name: str

    def trace(self, question: CheckQuestion, first: Trace | None) -> Trace:
        """Compute a question. first: the trace of the other program, whose answer is given."""

    def close(self) -> None:
        """Free the model's memory."""


class InPumice:
    """A model in Pumice. open_model: opens it when it is needed."""

    def __init__(self, name: str, open_model: Callable[[], Assistant], new_tokens: int) -> None:
        self.name, self._open, self._new = name, open_model, new_tokens

    @cached_property
    def assistant(self) -> Assistant:
        return self._open()

    def close(self) -> None:
        vars(self).pop("assistant", None)

    @torch.inference_mode()
    def trace(self, question: CheckQuestion, first: Trace | None) -> Trace:
        # Greedy, whatever the folder says: each token is then compared with the likeliest of another program.
        options: dict[str, Any] = {"temperature": 0.0, "num_beams": 1, "max_new_tokens": self._new}
        prompt = self.assistant.prompt(question.conversation, **options)
        image_tokens = prompt.encode_images()
        if first is None:
            written = tuple(t for _, t in generate(self.assistant.model, [prompt]) if t is not None)
        else:
            written = first.written
        ids = tuple(prompt.input_ids.tolist())
        config = self.assistant.model.config.decoder
        fits = first is None or _fits(first, config.vocab_size, config.width)
        # Another vocabulary may lack the tokens of the first one's answer.
        logprobs, shared = self._logprobs(ids, image_tokens, written if fits else ()), None
        if first is not None and fits:
            shared = self._logprobs(first.ids or (), first.image_tokens, written)
        words = tuple(map(self._words, logprobs))
        return Trace(len(ids), written, ids, image_tokens, logprobs, shared, words)

    def _logprobs(self, ids: Sequence[int], image_tokens: Tensor | None, written: Sequence[int]) -> Tensor:
        model = self.assistant.model
        row = torch.tensor([[*ids, *written]], device=model.device)
        hidden = model(row, image_tokens)[0, len(ids) - 1 :]
        return model.decoder.logits(hidden).float().log_softmax(-1).cpu()

    def _words(self, row: Tensor) -> dict[str, float]:
        top = row.topk(min(LIKELY, len(row)))
        return dict(zip(map(self.word, top.indices.tolist()), top.values.tolist(), strict=True))

    def word(self, number: int) -> str:
        """Return the text of one token."""
        data = self.assistant.processor.tokenizer.token_bytes(number)
        return (data or b"").decode("utf-8", "replace")


class InLlamaCpp:
    """A GGUF pair in llama.cpp. processor: of the same model, whose template writes the prompt."""

    def __init__(self, name: str, model: Path, mmproj: Path | None, processor: Processor) -> None:
        """Raises InputError without llama.cpp. The pair is opened when it is asked first."""
        mtmd_library(PURPOSE)
        self.name, self._files, self._processor = name, (model, mmproj), processor

    @cached_property
    def _llama(self) -> LlamaCpp:
        return LlamaCpp(*self._files)

    def close(self) -> None:
        if "_llama" in vars(self):
            self._llama.close()
            del self._llama

    def trace(self, question: CheckQuestion, first: Trace | None) -> Trace:
        if first is None:
            raise InputError("llama.cpp is compared with a model, and is no model to compare with; swap them")
        pieces: list[list[int] | Tensor] = []
        ids: list[int] = []
        for piece in self._processor.pieces(question.conversation):
            if isinstance(piece, ImagePart):
                seen = self._llama.image_tokens(open_image(piece.source))
                pieces.append(seen)
                ids += [IMAGE_TOKEN] * len(seen)
            else:
                pieces.append(self._llama.ids(piece, first=not ids))
                ids += pieces[-1]
        seen_pieces = [piece for piece in pieces if isinstance(piece, Tensor)]
        fits = _fits(first, self._llama.rows, self._llama.width)
        written = first.written if fits else ()  # another vocabulary may lack these tokens
        logprobs, shared = self._llama.logits(pieces, written).log_softmax(-1), None
        if fits:
            shared = self._llama.logits(_pieces(first), first.written).log_softmax(-1)
        image_tokens = torch.cat(seen_pieces) if seen_pieces else None
        return Trace(len(ids), first.written, tuple(ids), image_tokens, logprobs, shared)


class AtAddress:
    """A model at an address that speaks OpenAI's protocol; it may give log-probabilities."""

    def __init__(self, url: str, model: str | None, new_tokens: int) -> None:
        """model: its name there; None: the first one that the server lists."""
        self.name, self._new = url, new_tokens
        self._endpoint = with_model(ChatEndpoint(url=url, model=model or ""))

    def close(self) -> None:
        pass

    def trace(self, question: CheckQuestion, first: Trace | None) -> Trace:
        pictures = [p if isinstance(p, bytes) else p.read_bytes() for p in question.pictures]
        message = {"role": "user", "content": with_images(question.text, pictures)}
        options = {"temperature": 0, "max_tokens": self._new, "logprobs": True, "top_logprobs": LIKELY}
        [reply] = ask_in_order(self._endpoint, [{"messages": [message], **options}])
        if isinstance(reply, InputError):
            raise reply
        steps = (reply.values["choices"][0].get("logprobs") or {}).get("content") or []
        words = tuple({top["token"]: top["logprob"] for top in step["top_logprobs"]} for step in steps)
        written = tuple(step["token"] for step in steps) or (reply.text,)
        length = (reply.values.get("usage") or {}).get("prompt_tokens") or 0
        return Trace(length, written, words=words)


def compare(first: Trace, second: Trace, tolerance: float, word: Callable[[int], str]) -> list[CheckStage]:
    """Return the stages of two traces of one question, in their order.

    tolerance: of log-probabilities. word: the text of one of the first program's tokens.
    """
    assert first.ids is not None and first.logprobs is not None
    if second.ids is None or second.logprobs is None:
        return [_lengths(first, second), _texts(first, second, tolerance, word)]
    stages = [_tokenizer(first.ids, second.ids)]
    if first.image_tokens is not None or second.image_tokens is not None:
        stages += [_image_tokens(first, second), _tower(first.image_tokens, second.image_tokens)]
    if second.shared is None:
        stages.append(CheckStage("decoder", False, "another width or vocabulary: it is another model"))
        return stages
    top = first.logprobs.topk(min(LIKELY, first.logprobs.shape[1]))
    for name, logprobs in (("decoder", second.shared), ("answer", second.logprobs)):
        # The first one's likeliest tokens and the second one's choice; also of the stop behind the answer.
        choices = logprobs.argmax(1, keepdim=True)
        tokens = torch.cat([top.indices, choices], 1)
        worst = (first.logprobs.gather(1, tokens) - logprobs.gather(1, tokens)).abs().max().item()
        equal = (first.logprobs.argmax(1, keepdim=True) == choices)[:, 0].tolist()
        stages.append(_steps(name, worst, equal, tolerance))
    return stages


def first_parting(stages: Sequence[CheckStage]) -> str | None:
    """Return the earliest of STAGES in which two programs differ, None if they differ in none.

    stages: of all questions, for one without a picture shows nothing of the tower.
    """
    return min((stage.name for stage in stages if stage.same is False), key=STAGES.index, default=None)


def drawn_picture(side: int) -> bytes:
    """Return a PNG of smooth colours, which no program resizes if its tower takes `side` pixels."""
    noise = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, (side, side), mode="bicubic").clamp(0, 1)
    file = io.BytesIO()
    Image.fromarray((smooth[0].permute(1, 2, 0) * 255).byte().numpy()).save(file, "PNG")
    return file.getvalue()


def _fits(first: Trace, rows: int, width: int) -> bool:
    """Return whether a decoder of this vocabulary and width can compute what the first one computed."""
    if first.logprobs is None or first.logprobs.shape[1] != rows:
        return False
    return first.image_tokens is None or first.image_tokens.shape[1] == width


def _pieces(trace: Trace) -> list[list[int] | Tensor]:
    """Return a prompt's ids, cut where its image tokens stand, and these."""
    assert trace.ids is not None
    pieces: list[list[int] | Tensor] = []
    used = 0
    for is_image, group in groupby(trace.ids, IMAGE_TOKEN.__eq__):
        numbers = list(group)
        if not is_image:
            pieces.append(numbers)
            continue
        assert trace.image_tokens is not None
        pieces.append(trace.image_tokens[used : used + len(numbers)])
        used += len(numbers)
    return pieces


def _tokenizer(first: Sequence[int], second: Sequence[int]) -> CheckStage:
    texts = [[number for number in ids if number != IMAGE_TOKEN] for ids in (first, second)]
    if texts[0] == texts[1]:
        return CheckStage("tokenizer", True, f"{counted(len(texts[0]), 'equal id')}")
    place = next(
        (n for n, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1]), min(map(len, texts))
    )
    shown = " and ".join(str(ids[place] if place < len(ids) else "nothing") for ids in texts)
    return CheckStage(
        "tokenizer", False, f"{len(texts[0])} and {counted(len(texts[1]), 'id')}; number {place} is {shown}"
    )


def _image_tokens(first: Trace, second: Trace) -> CheckStage:
    counts = [0 if trace.image_tokens is None else len(trace.image_tokens) for trace in (first, second)]
    return CheckStage("image tokens", counts[0] == counts[1], " and ".join(map(str, counts)))


def _tower(first: Tensor | None, second: Tensor | None) -> CheckStage:
    if first is None or second is None or first.shape != second.shape:
        return CheckStage("tower", False, "features of different shapes")
    error = ((second - first).square().mean() / first.square().mean()).sqrt().item()
    return CheckStage("tower", error <= TOWER_TOLERANCE, f"features differ by {error:.2%} (root mean square)")


def _steps(
    name: str, worst: float, equal: Sequence[bool], tolerance: float, compared: bool = True
) -> CheckStage:
    """Return a stage of log-probabilities.

    worst: the largest difference. equal: at each step, whether the likeliest token is the same. compared:
    whether `worst` covers those that are not the same; if they change places within the tolerance, that is no
    difference.
    """
    count = next((number for number, same in enumerate(equal) if not same), len(equal))
    says = f"log-probabilities within {worst:.2g}, the first {count} of {len(equal)} likeliest tokens equal"
    same = worst <= tolerance and (compared or count == len(equal))
    if same and count < len(equal):
        says += ", then two that are nearly as likely change places"
    return CheckStage(name, same, says)


def _texts(first: Trace, second: Trace, tolerance: float, word: Callable[[int], str]) -> CheckStage:
    """Compare an answer with a server's, token by token as text, until they part."""
    ours = [word(number) for number in first.written]
    if not second.words:
        same = "".join(ours) == "".join(second.written)
        return CheckStage("answer", same, "only texts are compared: the server gives no log-probabilities")
    equal = [a == b for a, b in zip(ours, second.written, strict=False)]
    until = equal.index(False) + 1 if False in equal else len(equal)
    differences = [
        abs(step[token] - other[token])
        for step, other in zip(first.words[:until], second.words[:until], strict=False)
        for token in step.keys() & other.keys()
    ]
    # Each one's choice where they part, which the other one need not have listed.
    parted = set() if all(equal) else {ours[until - 1], second.written[until - 1]}
    compared = not parted or parted <= first.words[until - 1].keys() & second.words[until - 1].keys()
    return _steps("answer", max(differences, default=0.0), equal, tolerance, compared)


def _lengths(first: Trace, second: Trace) -> CheckStage:
    if not second.length:
        return CheckStage("prompt", None, "the server does not say how many tokens the prompt has")
    same = first.length == second.length
    return CheckStage("prompt", same, f"{first.length} and {counted(second.length, 'token')}")
