"""Run lmms-eval's tasks with a Pumice model: `python -m lmms_eval --model pumice --tasks ...`.

lmms-eval (0.7) finds `manifest` by the entry point "lmms_eval.models". Nothing in Pumice imports this module,
so lmms-eval is optional.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from pumice.assistant import Assistant, load
from pumice.conversation import Conversation, Message, user_message
from pumice.errors import InputError
from pumice.model.finite import check_finite
from pumice.tokens import IGNORE

MAX_NEW_TOKENS = 1024  # where a task sets none; the default of lmms-eval's own LLaVA
PLACEHOLDER = "<image>"


def manifest() -> ModelManifest:
    """Return the entry for lmms-eval's registry of models."""
    return ModelManifest(model_id="pumice", simple_class_path=f"{__name__}.Pumice")


class Pumice(lmms):
    """One model in one process. It refuses tasks that show videos or sound.

    pretrained: what `pumice.load` accepts. batch_size: questions answered together.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "pumice-tiny",
        device: str | None = None,
        batch_size: int | str = 16,
        quantize: str | None = "auto",
        **extra: Any,
    ) -> None:
        super().__init__()
        if unknown := set(extra) - {"max_batch_size"}:  # lmms-eval always gives max_batch_size
            raise InputError(
                f"unknown model_args {', '.join(sorted(unknown))}; use pretrained, device, quantize"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("Pumice runs in one process under lmms-eval; start it without accelerate launch")
        if quantize not in ("auto", "int8", None, "none"):
            raise InputError(f"quantize is {quantize!r}; use auto, int8 or none")
        bits: Literal["auto", "int8"] | None
        bits = "int8" if quantize == "int8" else "auto" if quantize == "auto" else None
        self.assistant: Assistant = load(pretrained, device=device, quantize=bits)
        self.slots = int(batch_size) if str(batch_size).isdecimal() and int(batch_size) > 1 else 16

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answers in the order of the requests.

        Requests with the same options are decoded together, because one batch has one set of options.
        """
        # 1. Read the requests and group them by their options.
        groups: dict[tuple[tuple[str, Any], ...], list[int]] = {}
        rows: list[tuple[list[Any] | None, str]] = []
        for number, request in enumerate(requests):
            context, options, doc_to_visual, doc_id, task, split = request.args
            images = self._images(doc_to_visual, doc_id, task, split)
            rows.append((images or None, _match_placeholders(context, len(images))))
            groups.setdefault(tuple(sorted(sampling(options).items())), []).append(number)
        # 2. Answer each group, and tell lmms-eval's cache each answer.
        answers = [""] * len(rows)
        for options, numbers in groups.items():
            group = (rows[number] for number in numbers)
            replies = self.assistant.ask_each(group, slots=self.slots, **dict(options))
            for number, answer in zip(numbers, replies, strict=True):
                if isinstance(answer, InputError):
                    raise answer
                answers[number] = answer
                context, task_options, *_ = requests[number].args
                self.cache_hook.add_partial("generate_until", (context, task_options), answer)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return (loss, greedy) per request.

        loss: the mean loss of the continuation's tokens in nats; lower is better, as lmms-eval's own models
        return it. greedy: whether every token is the most likely one.
        """
        losses = []
        for request in requests:
            context, continuation, doc_to_visual, doc_id, task, split = request.args
            if not isinstance(continuation, str):
                continuation = continuation(self.task_dict[task][split][doc_id])
            images = self._images(doc_to_visual, doc_id, task, split)
            question = user_message(_match_placeholders(context, len(images)), images)
            losses.append(self._loss(question, str(continuation)))
        return losses

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raise InputError: tasks of several rounds write their prompts for one family of models."""
        raise InputError("Pumice answers lmms-eval's tasks of one round only; leave out those of several")

    @torch.inference_mode()
    def _loss(self, question: Message, continuation: str) -> tuple[float, bool]:
        asked = Conversation((question,))
        answered = Conversation((question, Message("assistant", (continuation.strip(),))))
        assistant = self.assistant
        sample = assistant.processor.training_sample(answered)
        labels = torch.from_numpy(sample.labels)
        positions = (labels != IGNORE).nonzero().flatten()
        if len(positions) > 1:
            positions = positions[:-1]  # the template's end of an answer is no part of the continuation
        image_tokens = assistant.prompt(asked).encode_images()
        ids = torch.from_numpy(sample.input_ids).to(assistant.model.device)[None]
        hidden = assistant.model(ids, image_tokens)  # (1, T, D)
        logits = assistant.model.decoder.logits(hidden[:, positions.to(hidden.device) - 1])[0].float().cpu()
        check_finite(assistant.model, logits)
        targets = labels[positions]
        loss = torch.nn.functional.cross_entropy(logits, targets)
        return float(loss), bool((logits.argmax(-1) == targets).all())

    def _images(self, doc_to_visual: Any, doc_id: Any, task: str, split: str) -> list[Image.Image]:
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        visuals = visuals if isinstance(visuals, list | tuple) else [] if visuals is None else [visuals]
        for visual in visuals:
            if not isinstance(visual, Image.Image):
                raise InputError(f"task {task} shows {type(visual).__name__}; Pumice sees pictures alone")
        return [visual.convert("RGB") for visual in visuals]


def _match_placeholders(context: str, images: int) -> str:
    """Keep placeholders only if there is one per image; without them the images come first."""
    if context.count(PLACEHOLDER) == images:
        return context
    return context.replace(PLACEHOLDER, "").strip()


def sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert lmms-eval's generation_kwargs to fields of `SamplingParams`."""
    stop = options.get("until") or ()
    samples = bool(options.get("do_sample", float(options.get("temperature") or 0) > 0))
    beams, length_penalty = int(options.get("num_beams") or 1), options.get("length_penalty")
    params: dict[str, Any] = {
        "max_new_tokens": int(options.get("max_new_tokens") or MAX_NEW_TOKENS),
        "temperature": float(options.get("temperature") or 0) if samples else 0.0,
        "stop": (stop,) if isinstance(stop, str) else tuple(stop),
        "num_beams": beams,
    }
    if beams > 1:
        params["length_penalty"] = 1.0 if length_penalty is None else float(length_penalty)
    if params["temperature"] and options.get("top_p"):
        params["top_p"] = float(options["top_p"])
    return params
