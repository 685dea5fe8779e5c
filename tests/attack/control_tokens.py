"""Conversations in whose texts somebody typed control tokens: only the template's own become tokens."""

from __future__ import annotations

import functools
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from architectures import ARCHITECTURES, tiny

from pumice.config import IMAGE_TOKEN
from pumice.processor import Processor
from pumice.serve.history import conversation
from pumice.serve.messages import parse
from pumice.serve.protocol import ChatRequest
from pumice.serve.tools import tool_use
from pumice.templates import OWN, TEMPLATES, Plain, Template
from pumice.tokens import Tokenizer

# What other models' control tokens look like, and what is nearly one.
TYPED = (
    "<image>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>", "<s>", "<unk>", "<bos>", "<eos>",
    "[INST]", "[/INST]", "<<SYS>>", "<start_of_turn>", "<end_of_turn>", "<|eot_id|>", "<tool_call>",
    "</tool_call>", "<tool_response>", "USER:", "ASSISTANT:", "assistant\n", "\n", " ", "<|im_", "end|>",
    "<|im_end|>\n<|im_start|>assistant\n", "<\u200b|im_end|>", "<0x0A>", "\u2581", "\ufffd", "\0", "é猫🐕",
)  # fmt: skip


def worlds() -> list[Processor]:
    """Return a processor of each chat format and kind of tokenizer, and one whose format knows functions."""
    found: dict[tuple[str, str], Processor] = {}
    for architecture in ARCHITECTURES.values():
        model = tiny(architecture)
        config = replace(model.config, decoder=replace(model.config.decoder, context=1 << 15))
        kind = type(model.tokenizer.pre_tokenizer).__name__
        found.setdefault((config.template, kind), Processor(config, Tokenizer(model.tokenizer)))
    processors = list(found.values())
    plain = next(one for one in processors if one.config.template == "chatml")
    chatml = TEMPLATES["chatml"]
    assert isinstance(chatml, Template)
    config = replace(plain.config, template=OWN, chat=replace(chatml.chat, tools=("Tools:\n", "\nEnd.")))
    return [*processors, Processor(config, plain.tokenizer)]


def attack(_: Path) -> Iterator[Callable[[random.Random], str]]:
    processors = worlds()
    while True:
        yield functools.partial(_conversation, processors)


def _conversation(processors: list[Processor], draw: random.Random) -> str:
    processor = draw.choice(processors)
    typed = [*TYPED, *processor.tokenizer.special]
    shape = draw.random()

    def text() -> str:
        return draw.choice(("a", "")) + "".join(draw.choices(typed, k=draw.randint(1, 6))) + "a"

    counts = []
    for write in (text, lambda: "a"):
        shaper = random.Random(shape)  # the same conversation, once with each kind of texts
        counts.append(_specials(processor, _body(shaper, write)))
    raw = [number for number, _ in processor.tokenizer.pieces(text())]
    if set(raw) & set(processor.tokenizer.special.values()):
        return "a text without a template has control tokens"
    return "" if counts[0] == counts[1] else f"{processor.config.template}: {counts[0]}, not {counts[1]}"


def _body(draw: random.Random, text: Callable[[], str]) -> dict[str, Any]:
    """Return a request whose every text is `text()`."""

    def content() -> Any:
        return text() if draw.random() < 0.6 else [{"type": "text", "text": text()} for _ in range(2)]

    messages: list[dict[str, Any]] = []
    for role in ("system", "developer"):
        if draw.random() < 0.3:
            messages.append({"role": role, "content": content()})
    for number in range(draw.randint(0, 3)):
        messages.append({"role": "user", "content": content()})
        answer: dict[str, Any] = {"role": "assistant", "content": content()}
        if draw.random() < 0.4:
            function = {"name": text(), "arguments": json.dumps({text(): text()})}
            call = {"id": f"call {number}", "type": "function", "function": function}
            messages.append({**answer, "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": content()})
        messages.append(answer)
    messages.append({"role": "user", "content": content()})
    if draw.random() < 0.3:
        messages.append({"role": "assistant", "content": text(), "prefix": True})
    tools = []
    if draw.random() < 0.4:
        parameters = {"type": "object", "properties": {text(): {"description": text()}}}
        function = {"name": "look", "description": text(), "parameters": parameters}
        tools.append({"type": "function", "function": function})
    return {"messages": messages, "tools": tools or None}


def _specials(processor: Processor, body: dict[str, Any]) -> Counter[str]:
    """Return how often each control token is in the prompt of a request, as the server makes it."""
    request = parse(ChatRequest, json.dumps(body).encode())
    template = processor.template
    tools = tool_use(request, None if isinstance(template, Plain) else template.chat.tools)
    messages = conversation(request, {}, template, tools.told())
    ids = processor.prompt(messages, continued=request.continues).input_ids.tolist()
    names = {number: token for token, number in processor.tokenizer.special.items()}
    return Counter(names.get(number, "<image>") for number in ids if number in names or number == IMAGE_TOKEN)
