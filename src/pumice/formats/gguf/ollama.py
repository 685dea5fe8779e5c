"""Write the Modelfile with which Ollama runs a pair of GGUF files: chat template, stops, sampling.

Ollama's templates are those of Go's text/template. It puts `[img-0]`, `[img-1]`, ... before the text of a
message, one for each of its pictures.
"""

from __future__ import annotations

import json
from pathlib import Path

from pumice.config import ChatFormat, GenerationConfig, ModelConfig
from pumice.templates import Template, get_template
from pumice.tokens import Tokenizer

OLDEST = (
    "0.7.0"  # of May 2025, whose llama.cpp reads the feature layer and needs no key of older mmproj files
)
CONTEXT = 4096  # tokens, where the model has as many: room for keys and values is taken when it is loaded
_LEADING = 4  # pictures before a text whose places are recognised


def refusal(config: ModelConfig) -> str | None:
    """Return why no template of Ollama can write this model's conversations; None if one can."""
    if not isinstance(get_template(config.template, config.chat), Template):
        return f"the template {config.template!r} is no chat format"
    return None


def write_modelfile(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    """Write `Modelfile` beside the GGUF files in `folder`. Returns notes."""
    template = get_template(config.template, config.chat)
    assert isinstance(template, Template)
    go = go_template(template.chat, config.image_wrap)
    # 1. What it runs. Both halves are told apart by what they hold.
    files = [*sorted(folder.glob("model-*.gguf")), *sorted(folder.glob("mmproj-*.gguf"))]
    lines = [f"# For Ollama {OLDEST} or newer: ollama create NAME -f Modelfile"]
    lines += [f"FROM ./{file.name}" for file in files]
    lines.append(f'TEMPLATE """{go}"""')  # `_quoted` escapes quotes, so no three stand together in it
    # 2. What ends an answer, and how it is drawn. Ollama's own defaults differ from the model's.
    ends = [tokenizer.backend.id_to_token(number) for number in config.stop_token_ids]
    for stop in dict.fromkeys([template.stop.strip(), *ends]):
        if stop:
            lines.append(f"PARAMETER stop {_quoted(stop)}")
    generation: GenerationConfig = config.generation
    values: dict[str, float] = {
        "temperature": generation.temperature,
        "top_p": generation.top_p,
        "top_k": generation.top_k,
        "repeat_penalty": generation.repetition_penalty,
        "num_ctx": min(config.decoder.context, CONTEXT),
    }
    lines += [f"PARAMETER {name} {value:g}" for name, value in values.items()]
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    notes = [
        "in that folder: `ollama create NAME -f Modelfile`, then `ollama run NAME 'What is this? "
        f"./dog.jpg'` (Ollama {OLDEST} or newer)"
    ]
    if generation.num_beams > 1:
        notes.append("Ollama has no beam search: it takes the likeliest token each time")
    if template.chat.trim:
        notes.append("Ollama does not remove the blanks around a text, as this chat format does")
    return notes


def go_template(chat: ChatFormat, image_wrap: tuple[str, str] | None = None) -> str:
    """Return a template of Go that writes a conversation as `Template.render` does, up to the next answer.

    image_wrap: the texts around each picture.
    """
    before, after = chat.system or ("", "")
    system = "{{ if $system }}" + _text(before) + "{{ $system }}" + _text(after) + "{{ end }}"
    default = _quoted(chat.default_system or "")
    start = "{{ $system := " + (f"or .System {default}" if chat.system else '""') + " }}"
    stop = "" if chat.stop_once else _text(chat.stop)
    question = _text(chat.user[0])
    if chat.system_in_user:
        question += "{{ if $first }}" + system + "{{ end }}"
    else:
        start += system
    question += _content(*(image_wrap or ("", ""))) + "{{ $first = false }}" + _text(chat.user[1])
    # An answer that comes last is continued.
    newest, earlier = _text(chat.assistant + chat.opening), _text(chat.earlier or chat.assistant)
    opens = "{{ if $last }}" + newest + "{{ else }}" + earlier + "{{ end }}"
    ends = _text(chat.answer[1]) + stop + _text(chat.between)
    answer = opens + _text(chat.answer[0]) + "{{ .Content }}{{ if not $last }}" + ends + "{{ end }}"
    return (
        start
        + "{{ $first := true }}{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        + '{{ if eq .Role "user" }}'
        + question
        + "{{ if $last }}"
        + _text(chat.assistant + chat.opening)
        + "{{ end }}"
        + '{{ else if eq .Role "assistant" }}'
        + answer
        + "{{ end }}{{ end }}"
    )


def _content(left: str, right: str) -> str:
    """Write a question: each picture before it on a line of its own, as the model was trained.

    A picture's tag has one or two digits. Go's `and` computes both sides in old versions, so ifs are nested.
    """
    tag = ""
    for size in (7, 8):
        found = f'{{{{ if eq (slice $text {size - 1} {size}) "]" }}}}'
        rest = f"{{{{ slice $text 0 {size} }}}}{_text(right)}{{{{ $text = slice $text {size} }}}}"
        line = '{{ if $text }}{{ "\\n" }}{{ end }}'
        tag += f"{{{{ if ge (len $text) {size} }}}}{found}{_text(left)}{rest}{line}{{{{ $seen = true }}}}"
        tag += "{{ end }}{{ end }}"
        if size == 7:
            tag += "{{ if not $seen }}"
    tag = '{{ if ge (len $text) 7 }}{{ if eq (slice $text 0 5) "[img-" }}{{ $seen := false }}' + tag
    return "{{ $text := .Content }}" + _LEADING * (tag + "{{ end }}{{ end }}{{ end }}") + "{{ $text }}"


def _text(text: str) -> str:
    return "{{ " + _quoted(text) + " }}" if text else ""


def _quoted(text: str) -> str:
    """Return a text as Go quotes it, which JSON does, too."""
    return json.dumps(text, ensure_ascii=False)
