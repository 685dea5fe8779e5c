"""lmms-eval's tasks asked of a Pumice model: `python -m lmms_eval --model pumice --tasks ...`.

lmms-eval finds `manifest` by the entry point "lmms_eval.models" and imports this module itself; nothing in
Pumice does, so that lmms-eval need not be installed. Written for lmms-eval 0.7. Knows its model interface
(`lmms_eval.api.model.lmms`) and the Assistant. Does not know any task.
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
from pumice.tokens import IGNORE

LONGEST = 1024  # tokens, where a task sets no max_new_tokens; as lmms-eval's own LLaVA has it
PLACEHOLDER = "<image>"


def manifest() -> ModelManifest:
    """What lmms-eval's registry wants to know."""
    return ModelManifest(model_id="pumice", simple_class_path=f"{__name__}.Pumice")


class Pumice(lmms):
    """One model in one process. Pictures only: a task that shows videos or sound is refused.

    pretrained: whatever `pumice.load` takes. batch_size: questions answered together.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "pumice-tiny",
        device: str | None = None,
        batch_size: int | str = 16,
        quantize: str | None = "auto",
        **more: Any,
    ) -> None:
        super().__init__()
        if unknown := set(more) - {"max_batch_size"}:  # lmms-eval always gives max_batch_size
            raise InputError(
                f"unknown model_args {', '.join(sorted(unknown))}; use pretrained, device, quantize"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("Pumice runs in one process under lmms-eval; start it without accelerate launch")
        if quantize not in ("auto", "int8", None, "none"):
            raise InputError(f"quantize is {quantize!r}; use auto, int8 or none")
        kind: Literal["auto", "int8"] | None
        kind = "int8" if quantize == "int8" else "auto" if quantize == "auto" else None
        self.assistant: Assistant = load(pretrained, device=device, quantize=kind)
        self.slots = int(batch_size) if str(batch_size).isdecimal() and int(batch_size) > 1 else 16

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests; those with the same options are decoded together."""
        groups: dict[tuple[tuple[str, Any], ...], list[int]] = {}
        rows: list[tuple[list[Any] | None, str]] = []
        for number, request in enumerate(requests):
            context, options, doc_to_visual, doc_id, task, split = request.args
            pictures = self._pictures(doc_to_visual, doc_id, task, split)
            rows.append((pictures or None, _placed(context, len(pictures))))
            groups.setdefault(tuple(sorted(sampling(options).items())), []).append(number)
        answers = [""] * len(rows)
        for options, numbers in groups.items():
            chosen = (rows[number] for number in numbers)
            said = self.assistant.ask_each(chosen, slots=self.slots, **dict(options))
            for number, answer in zip(numbers, said, strict=True):
                if isinstance(answer, InputError):
                    raise answer
                answers[number] = answer
                context, given, *_ = requests[number].args
                self.cache_hook.add_partial("generate_until", (context, given), answer)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(loss, greedy) per request: the mean loss of the continuation's tokens in nats, lower is better,
        as lmms-eval's own models return it and its tasks choose by it; and whether each token is the
        likeliest one."""
        found = []
        for request in requests:
            context, continuation, doc_to_visual, doc_id, task, split = request.args
            if not isinstance(continuation, str):
                continuation = continuation(self.task_dict[task][split][doc_id])
            pictures = self._pictures(doc_to_visual, doc_id, task, split)
            question = user_message(_placed(context, len(pictures)), pictures)
            found.append(self._loss(question, str(continuation)))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raises InputError: tasks of several rounds write prompts for one family of models each."""
        raise InputError("Pumice answers lmms-eval's tasks of one round only; leave out those of several")

    @torch.inference_mode()
    def _loss(self, question: Message, continuation: str) -> tuple[float, bool]:
        asked = Conversation((question,))
        answered = Conversation((question, Message("assistant", (continuation.strip(),))))
        assistant = self.assistant
        sample = assistant.processor.training_sample(answered)
        labels = torch.from_numpy(sample.labels)
        said = (labels != IGNORE).nonzero().flatten()
        if len(said) > 1:
            said = said[:-1]  # without the template's own end of an answer
        image_tokens = assistant.prompt(asked).encode_images()
        ids = torch.from_numpy(sample.input_ids).to(assistant.model.device)[None]
        hidden = assistant.model(ids, image_tokens)  # (1, T, D)
        logits = assistant.model.decoder.logits(hidden[:, said.to(hidden.device) - 1])[0].float().cpu()
        wanted = labels[said]
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        return float(loss), bool((logits.argmax(-1) == wanted).all())

    def _pictures(self, doc_to_visual: Any, doc_id: Any, task: str, split: str) -> list[Image.Image]:
        shown = doc_to_visual(self.task_dict[task][split][doc_id])
        shown = shown if isinstance(shown, list | tuple) else [] if shown is None else [shown]
        for visual in shown:
            if not isinstance(visual, Image.Image):
                raise InputError(f"task {task} shows {type(visual).__name__}; Pumice sees pictures alone")
        return [visual.convert("RGB") for visual in shown]


def _placed(context: str, pictures: int) -> str:
    """The text with placeholders only where there is one for each picture; else the pictures come first."""
    if context.count(PLACEHOLDER) == pictures:
        return context
    return context.replace(PLACEHOLDER, "").strip()


def sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """lmms-eval's generation_kwargs as fields of `SamplingParams`. Raises InputError on beams."""
    if int(options.get("num_beams") or 1) > 1:
        raise InputError(f"the task wants {options['num_beams']} beams; Pumice answers greedily or draws")
    stop = options.get("until") or ()
    drawn = bool(options.get("do_sample", float(options.get("temperature") or 0) > 0))
    found: dict[str, Any] = {
        "max_new_tokens": int(options.get("max_new_tokens") or LONGEST),
        "temperature": float(options.get("temperature") or 0) if drawn else 0.0,
        "stop": (stop,) if isinstance(stop, str) else tuple(stop),
    }
    if drawn and options.get("top_p"):
        found["top_p"] = float(options["top_p"])
    return found
