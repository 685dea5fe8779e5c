"""What `make.py` writes with and the tests read with: the command line, a teacher, what must stay equal.

Everything goes through surfaces that users have: commands, files, HTTP, `pumice.load`. Nothing here imports a
module of Pumice but `pumice` itself and its command line.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import typer.main
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from typer.testing import CliRunner, Result

import pumice
from pumice.cli import app

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FILES = HERE / "files"  # a working folder, whose runs were all stopped half way
ENDS = HERE / "ends"  # what came of the same runs, where they were not stopped
SURFACE = HERE / "surface"  # what commands, server and Python offer

MODEL = ("--model", "model", "--device", "cpu")
EXACT = ("--quantize", "none")


def command(*words: str) -> Result:
    """Run `pumice WORDS` here, in this process."""
    return CliRunner().invoke(app, list(words))


def run_pumice(*words: str) -> Result:
    """The same of a command that must succeed."""
    result = command(*words)
    assert result.exit_code == 0, f"pumice {' '.join(words)}: {result.output}"
    return result


def read(path: Path) -> Any:
    """JSON, or the list of a JSON Lines file's rows."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def differences(now: Any, then: Any, path: str = "$") -> list[str]:
    """Where two JSON values differ; floats may by a thousandth, as another processor rounds otherwise."""
    if isinstance(now, dict) and isinstance(then, dict):
        differing = [f"{path}: keys {sorted(now.keys() ^ then.keys())}"] if now.keys() != then.keys() else []
        shared = now.keys() & then.keys()
        for key in sorted(shared):
            differing += differences(now[key], then[key], f"{path}.{key}")
        return differing
    if isinstance(now, list) and isinstance(then, list) and len(now) == len(then):
        pairs = enumerate(zip(now, then, strict=True))
        return [d for n, (a, b) in pairs for d in differences(a, b, f"{path}[{n}]")]
    if isinstance(now, float) and isinstance(then, float):
        return [] if math.isclose(now, then, rel_tol=1e-3, abs_tol=1e-4) else [f"{path}: {now} was {then}"]
    return [] if type(now) is type(then) and now == then else [f"{path}: {now!r} was {then!r}"]


# --- a run of training, seen through torch's own hooks


class Watch:
    """What a run of training computes: state before its first step, rows in order, a tower's work."""

    def __init__(self) -> None:
        self.steps: list[list[list[int]]] = []  # of each step its packs, as token ids in order
        self.rng: Tensor | None = None  # before anything was drawn
        self.tensors: list[Tensor] = []  # what learns and the optimiser's moments, before the first step
        self.looks = 0  # convolutions: only the tower has one
        self._packs: list[list[int]] = []

    def _forward(self, module: nn.Module, inputs: Any) -> None:
        if isinstance(module, nn.Conv2d):
            self.looks += 1
        if not torch.is_grad_enabled():
            return
        if self.rng is None:
            self.rng = torch.get_rng_state()
        if isinstance(module, nn.Embedding):
            self._packs.append(inputs[0].flatten().tolist())

    def _step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.steps.append(self._packs)
        self._packs = []
        if len(self.steps) > 1:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                held = [parameter, *optimizer.state.get(parameter, {}).values()]
                self.tensors += [value.detach().clone() for value in held if torch.is_tensor(value)]

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watch]:
        forward = register_module_forward_pre_hook(self._forward)
        step = register_optimizer_step_pre_hook(self._step)
        try:
            yield self
        finally:
            forward.remove()
            step.remove()


# --- a teacher


class Teacher:
    """An OpenAI-compatible endpoint on this machine, whose answers follow from the request alone."""

    def __init__(self) -> None:
        self.asked: list[str] = []  # the user's text of each request
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                content = body["messages"][-1]["content"]
                user = content if isinstance(content, str) else content[-1]["text"]
                owner.asked.append(user)
                message = {"role": "assistant", "content": owner.answer(user)}
                choice = {"message": message, "finish_reason": "stop"}
                usage = {"prompt_tokens": 40, "completion_tokens": 9}
                data = json.dumps({"choices": [choice], "usage": usage}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    @staticmethod
    def answer(user: str) -> str:
        animal = next(word for word in ("dog", "cat", "horse", "cow") if word in user)
        if animal == "cow":
            return "I will not say."
        return f"Question: Which animal is it?\nAnswer: It is a {animal}, and it rests."

    def command(self, *more: str) -> list[str]:
        """`pumice data generate` with this teacher."""
        url = f"http://127.0.0.1:{self.server.server_port}/v1"
        return [
            "data", "generate", "generated", "--teacher", url, "--model", "teacher", "--kind", "mine.py",
            "--jsonl", "annotations.jsonl", "--images", "pictures", "--show", "--parallel", "1",
            "--language", "any", *more,
        ]  # fmt: skip

    def __enter__(self) -> Teacher:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


# --- the surface: each function gives what `make.py --only surface` stores, as it is now


def helps() -> dict[str, list[str]]:
    """The text of every `--help`, by command, without what a terminal's width decides."""
    help_texts: dict[str, list[str]] = {}

    def visit(group: Any, words: tuple[str, ...]) -> None:
        result = CliRunner().invoke(app, [*words, "--help"], terminal_width=10_000, color=False)
        assert result.exit_code == 0, result.output
        lines = (" ".join(line.split()) for line in result.stdout.splitlines())
        help_texts[" ".join(("pumice", *words))] = [
            re.sub(r"^Usage: \S+", "Usage: pumice", s) for s in lines if s
        ]
        for name, inner in sorted(getattr(group, "commands", {}).items()):
            visit(inner, (*words, name))

    visit(typer.main.get_command(app), ())
    return help_texts


def openapi() -> Any:
    """/openapi.json of a real server."""
    words = ["serve", "--model", str(FILES / "model"), "--device", "cpu", "--port", "0", "--log", "json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pumice", *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert process.stderr is not None
    try:
        messages = []
        for line in process.stderr:
            messages.append(line)
            with contextlib.suppress(ValueError, KeyError, TypeError):
                url = json.loads(line)["url"]
                break
        else:
            raise AssertionError(f"the server did not start: {messages}")
        with urllib.request.urlopen(f"{url}/openapi.json", timeout=60) as response:
            document = json.load(response)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    document["info"].pop("version")  # of Pumice
    return document


# Commands that have --json; they run in a copy of FILES.
JSON = {
    "ask": ["ask", "pictures/0.png", "What is it?", *MODEL, *EXACT, "--max-new-tokens", "6", "--json"],
    "ask --batch": [
        "ask", "--batch", "questions.jsonl", "--out", "all.jsonl", *MODEL, *EXACT, "--max-new-tokens", "4",
        "--json",
    ],
    "explain": [
        "explain", "pictures/0.png", "What is it?", *MODEL, *EXACT, "--answer", "It is red.",
        "--occlusion", "2", "--json",
    ],
    "export --to hf": ["export", "model", "--to", "hf", "as-hf", "--json"],
    "export --to llava": ["export", "model", "--to", "llava", "as-llava", "--json"],
    "import": ["import", "as-hf", "imported", "--json"],
    "plan": [
        "plan", "recipe.yaml", "--gpu-memory", "24", "--rows", "100", "--processes", "2", "--set", "batch=1",
        "--set", "pack_tokens=64", "--json",
    ],
    "data check": ["data", "check", "rows.jsonl", "--images", "pictures", "--json"],
    "data check --recipe": [
        "data", "check", "rows.jsonl", "--images", "pictures", "--recipe", "recipe.yaml", "--json",
    ],
    "data show": ["data", "show", "rows.jsonl", "--template", "chatml", "--tokenizer", "model", "--json"],
    "data mix": ["data", "mix", "mix.yaml", "mixed.jsonl", "--json"],
    "eval": ["eval", "own", "--data", "own", "--predictions", "own/one.jsonl", "--json", "-"],
    "eval --compare": [
        "eval", "own", "--data", "own", "--predictions", "own/one.jsonl", "--compare", "own/two.jsonl",
        "--json", "-",
    ],
}  # fmt: skip
GENERATE = {"data generate --estimate": ["--estimate", "--json"], "data generate": ["--json"]}
OUTPUTS = [*JSON, *GENERATE, "doctor"]
VOLATILE = {"seconds", "time", "version", "pumice", "created", "date"}  # keys whose values are the moment's


def printed(words: list[str]) -> Any:
    """What a command with --json prints, without what differs from one moment to the next."""
    result = run_pumice(*words)
    return _settled(json.loads(result.stdout))


def output(name: str) -> Any:
    """What a command with --json prints, run in the current folder, a copy of FILES."""
    if name == "doctor":
        return doctor()
    if name in GENERATE:
        with Teacher() as teacher:
            return printed(teacher.command(*GENERATE[name]))
    if name == "import":
        run_pumice(*JSON["export --to hf"])
    return printed(JSON[name])


def _settled(value: Any) -> Any:
    if isinstance(value, dict):
        settled = {key: "..." if key in VOLATILE else _settled(inner) for key, inner in value.items()}
        if "scales" in value:  # attention in bytes, which another processor may round up
            settled |= {key: f"base64 of {len(value[key])} characters" for key in ("values", "scales")}
        return settled
    return [_settled(inner) for inner in value] if isinstance(value, list) else value


def doctor() -> list[str]:
    """The keys of `pumice doctor --json`: what stands there is the machine's."""
    result = command("doctor", "--no-test", "--json")
    assert result.exit_code in (0, 1), result.output
    return sorted(_keys(json.loads(result.stdout), "$"))


def _keys(value: Any, path: str) -> set[str]:
    if isinstance(value, dict):
        return {path}.union(*(_keys(inner, f"{path}.{key}") for key, inner in value.items()))
    if isinstance(value, list):
        return {path}.union(*(_keys(inner, f"{path}[]") for inner in value))
    return {path}


def signatures() -> dict[str, list[str]]:
    """The parameters of `pumice.load` and of what `Assistant` offers, a line each."""
    surface = {"pumice": sorted(dir(pumice)), "load": _parameters(pumice.load)}
    for name, value in sorted(vars(pumice.Assistant).items()):
        if inspect.isfunction(value) and (name == "__init__" or not name.startswith("_")):
            surface[f"Assistant.{name}"] = _parameters(value)
    return surface


def _parameters(function: Any) -> list[str]:
    signature = inspect.signature(function)
    lines = [
        f"{p.kind.name} {p.name}"
        + ("" if p.annotation is p.empty else f": {p.annotation}")
        + ("" if p.default is p.empty else f" = {p.default!r}")
        for p in signature.parameters.values()
    ]
    return [*lines, f"-> {signature.return_annotation}"]


# What a user's own kind of rows is made of.
OF_KINDS = (
    "MARKET", "SNOW", "Check", "Draft", "Example", "Kind", "Turn", "Unparsed", "pairs", "says_no", "says_yes",
    "whole",
)  # fmt: skip


def imports() -> list[list[str]]:
    """[module, name] of every import that documents, notebooks and examples show; an empty name for none."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.[mp][dy]")]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts += ["".join(cell["source"]) for cell in cells]
    shown_imports = {("pumice", name) for name in dir(pumice)}
    shown = re.compile(
        r"^\s*(from\s+pumice[\w.]*\s+import\s+(?:\([^)]*\)|[^(#\n]+)|import\s+pumice[\w.]*)", re.M
    )
    for text in texts:
        for statement in shown.findall(text):
            [node] = ast.parse(statement.strip()).body
            if isinstance(node, ast.ImportFrom):
                shown_imports |= {(str(node.module), alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                shown_imports |= {(alias.name, "") for alias in node.names}
    shown_imports |= {("pumice.generate.kinds.base", name) for name in OF_KINDS}
    return [list(pair) for pair in sorted(shown_imports)]


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
