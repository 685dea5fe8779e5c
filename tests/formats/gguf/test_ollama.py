"""What `--to ollama` writes: a template of Go that writes what ours writes, stops, and sampling."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pumice.config import GenerationConfig
from pumice.conversation import Conversation, ImagePart, Message, user_message
from pumice.errors import InputError
from pumice.formats.export import export
from pumice.formats.gguf.ollama import go_template
from pumice.templates import TEMPLATES, Template, get_template

PICTURE = object()  # stands for one
QWEN3 = replace(get_template("chatml").chat, opening="<think>\n\n</think>\n\n", default_system=None)
EARLIER = replace(get_template("chatml").chat, earlier="<|im_start|>assistant \n")  # llava-hf's Qwen2


class Go:
    """The part of Go's text/template that Ollama's templates here use: actions, if, range, variables, slices.

    `test_the_stand_in_is_go` compares it with Go itself, where that is installed.
    """

    def __init__(self, source: str) -> None:
        self._parts = re.split(r"\{\{ (.*?) \}\}", source)

    def render(self, data: dict[str, Any]) -> str:
        self._at = 0
        tree, _ = self._tree()
        self._out: list[str] = []
        self._run(tree, data, [{"$": data}])
        return "".join(self._out)

    def _tree(self) -> tuple[list[Any], str]:
        """The nodes up to `end`, `else` or the end of the text, and which of them it was."""
        nodes: list[Any] = []
        while self._at < len(self._parts):
            text, self._at = self._parts[self._at], self._at + 1
            if self._at % 2:
                nodes.append(("text", text))
                continue
            word, _, rest = text.partition(" ")
            if word in {"end", "else"}:
                return nodes, text
            if word in ("if", "range"):
                nodes.append(self._block(word, rest))
            else:
                nodes.append(("action", text))
        return nodes, ""

    def _block(self, word: str, rest: str) -> tuple[Any, ...]:
        body, ending = self._tree()
        otherwise: list[Any] = []
        if ending.startswith("else if "):
            otherwise = [self._block("if", ending.removeprefix("else if "))]
        elif ending == "else":
            otherwise, _ = self._tree()
        return word, rest, body, otherwise

    def _run(self, nodes: list[Any], dot: Any, scopes: list[dict[str, Any]]) -> None:
        for kind, text, *blocks in nodes:
            if kind == "text":
                self._out.append(text)
            elif kind == "range":
                names, _, source = text.partition(" := ")
                for number, item in enumerate(self._value(source, dot, scopes)):
                    variables = dict(zip(names.split(", "), (number, item), strict=True))
                    self._run(blocks[0], item, [*scopes, variables])
            elif kind == "if":
                chosen = blocks[0] if self._value(text, dot, scopes) else blocks[1]
                self._run(chosen, dot, [*scopes, {}])
            elif match := re.fullmatch(r"(\$\w+) (:?=) (.*)", text):
                name, sign, expression = match.groups()
                value = self._value(expression, dot, scopes)
                holder = scopes[-1] if sign == ":=" else next(s for s in scopes[::-1] if name in s)
                holder[name] = value
            else:
                self._out.append(str(self._value(text, dot, scopes)))

    def _value(self, text: str, dot: Any, scopes: list[dict[str, Any]]) -> Any:
        tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()]+', text)

        def operand() -> Any:
            token = tokens.pop(0)
            if token == "(":
                value = call()
                assert tokens.pop(0) == ")"
                return value
            if token[0] == '"':
                return json.loads(token)
            if token[0] in ".$":
                name, *path = token.split(".") if token[0] == "$" else ["", *token[1:].split(".")]
                value = next(s[name] for s in scopes[::-1] if name in s) if name else dot
                for key in path:
                    value = value.get(key, "")
                return value
            return {"true": True, "false": False}[token] if token in ("true", "false") else int(token)

        def call() -> Any:
            functions: dict[str, Any] = {
                "eq": lambda a, b: a == b, "ge": lambda a, b: a >= b, "not": lambda a: not a, "len": size,
                "or": lambda a, b: a or b, "slice": cut,
            }  # fmt: skip
            if tokens[0] not in functions:
                return operand()
            function, arguments = functions[tokens.pop(0)], []
            while tokens and tokens[0] != ")":
                arguments.append(operand())
            return function(*arguments)

        def size(value: Any) -> int:  # Go counts bytes of text
            return len(value.encode() if isinstance(value, str) else value)

        def cut(value: Any, first: int, end: int | None = None) -> Any:
            assert first <= size(value) and (end or 0) <= size(value), "Go would end with an error"
            return value.encode()[first:end].decode() if isinstance(value, str) else value[first:end]

        value = call()
        assert not tokens, text
        return value


def ollama(template: str, conversation: Conversation, render: Any = None) -> str:
    """The prompt as Ollama makes it: tags before the text of a message, all system messages as one."""
    numbers = itertools.count()
    messages = []
    for message in conversation.messages:
        tags = "".join(f"[img-{next(numbers)}]" for _ in message.images)
        messages.append({"Role": message.role, "Content": tags + message.text})
    system = "\n\n".join(m["Content"] for m in messages if m["Role"] == "system")
    data = {"System": system, "Messages": messages}
    return str(render(template, data) if render else Go(template).render(data))


def ours(template: Template, conversation: Conversation, wrap: tuple[str, str] = ("", "")) -> str:
    """The same by our template; a picture is Ollama's tag."""
    numbers = itertools.count()
    return "".join(
        f"{wrap[0]}[img-{next(numbers)}]{wrap[1]}" if isinstance(span, ImagePart) else span.text
        for span in template.render(conversation, generate=True)
    )


def conversations(chat: Any) -> list[Conversation]:
    said = [
        [
            user_message("What?", [PICTURE]),
            Message("assistant", ("A dog.",)),
            user_message("Why, naïve 北京?"),
        ],
        [user_message("Which [img] is {{ it }}?", [PICTURE] * 3)],
        [
            user_message('A "quoted"\nline', [PICTURE]),
            Message("assistant", ("Yes",)),
            user_message("b", [PICTURE]),
        ],
        [user_message("Hi")],
        [user_message("n", [PICTURE] * 4)]
        + [Message("assistant", ("y",)), user_message("n", [PICTURE] * 4)] * 2,
    ]
    if chat.system is not None:
        said.append([Message("system", ("Be brief.",)), *said[0]])
    return [Conversation(tuple(messages)) for messages in said]


FORMATS = {name: template.chat for name, template in TEMPLATES.items() if isinstance(template, Template)}


@pytest.mark.parametrize("name", [*FORMATS, "qwen3", "earlier"])
@pytest.mark.parametrize("wrap", [("", ""), ("<im_start>", "<im_end>")])
def test_go_writes_what_our_template_writes(name: str, wrap: tuple[str, str]) -> None:
    chat = (FORMATS | {"qwen3": QWEN3, "earlier": EARLIER})[name]
    template = go_template(chat, wrap)
    for conversation in conversations(chat):
        assert ollama(template, conversation) == ours(Template(name, chat), conversation, wrap)


@pytest.mark.parametrize("name", FORMATS)
def test_recorded_conversations(name: str) -> None:
    """Those of tests/golden, up to each of their answers, which begin without blanks."""
    golden = Path(__file__).parents[2] / "golden" / "conversations.json"
    template, compared = Template(name, FORMATS[name]), 0
    for case in json.loads(golden.read_text(encoding="utf-8"))["cases"]:
        messages = []
        for turn in case["conversations"]:
            text = turn["value"]
            human = turn["from"] == "human"
            pictures = [PICTURE] * text.count("<image>") if human else []
            messages.append(user_message(text, pictures) if human else Message("assistant", (text.lstrip(),)))
        for end in range(1, len(messages), 2):
            conversation = Conversation(tuple(messages[:end]))
            assert ollama(go_template(template.chat), conversation) == ours(template, conversation)
            compared += 1
    assert compared > 60


GO = """package main
import ("encoding/json"; "io"; "os"; "text/template")
func main() {
    var given struct { Template string; Data map[string]any }
    raw, _ := io.ReadAll(os.Stdin)
    if err := json.Unmarshal(raw, &given); err != nil { panic(err) }
    parsed := template.Must(template.New("").Option("missingkey=zero").Parse(given.Template))
    if err := parsed.Execute(os.Stdout, given.Data); err != nil { panic(err) }
}
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
def test_the_stand_in_is_go(tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(GO)
    subprocess.run(["go", "build", "-o", "render", "main.go"], cwd=tmp_path, check=True)

    def render(template: str, data: dict[str, Any]) -> str:
        given = json.dumps({"Template": template, "Data": data}).encode()
        done = subprocess.run([tmp_path / "render"], input=given, stdout=subprocess.PIPE, check=True)
        return done.stdout.decode()

    for chat in [*FORMATS.values(), QWEN3]:
        template = go_template(chat, ("<a>", "<b>"))
        for conversation in conversations(chat):
            assert ollama(template, conversation) == ollama(template, conversation, render)


def test_the_folder(models: ModuleType, tmp_path: Path) -> None:
    model = models.tiny(models.ARCHITECTURES["SigLIP + Qwen2, squash"])
    config = replace(model.config, generation=GenerationConfig(temperature=0.2, top_p=0.9))
    exported = export(replace(model, config=config), "ollama", tmp_path / "out", kind="q8_0")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "Modelfile", "mmproj-f16.gguf", "model-q8_0.gguf",
    ]  # fmt: skip
    text = (tmp_path / "out" / "Modelfile").read_text()
    template = go_template(get_template("chatml").chat)
    assert f'TEMPLATE """{template}"""' in text
    assert text.replace(template, "").splitlines() == [
        "# For Ollama 0.7.0 or newer: ollama create NAME -f Modelfile",
        "FROM ./model-q8_0.gguf",
        "FROM ./mmproj-f16.gguf",
        'TEMPLATE """"""',
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER temperature 0.2",
        "PARAMETER top_p 0.9",
        "PARAMETER top_k 0",
        "PARAMETER repeat_penalty 1",
        "PARAMETER num_ctx 1024",
    ]
    assert any("`ollama create NAME -f Modelfile`, then `ollama run NAME" in note for note in exported.notes)
    with pytest.raises(InputError, match="dtype is not for ollama; give the type"):
        export(model, "ollama", tmp_path / "x", dtype="fp16")
