"""What the documentation says can be done: its commands exist and run, its links lead somewhere.

Every line in a block that begins with `pumice`, and every `pumice ...` in a sentence, is parsed by the real
command line. The blocks marked `bash` of the pages in RUN are run as well, in order, one folder per page, on
a tiny random model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest
import typer.main
import yaml
from typer.testing import CliRunner

from pumice.cli import app
from pumice.formats.export import export
from pumice.train.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "examples/README.md", "recipes/README.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
PAGES += ["projects/pumice-tiny/README.md", "src/pumice/models/pumice-tiny/README.md"]
RUN = ["README.md", "docs/tutorial.md", "docs/finetuning.md", "docs/troubleshooting.md", "docs/doctor.md"]
RUN += ["docs/coming-from.md"]
COMMAND = re.compile(r"^(?:\$ )?(?:\.venv/bin/|python -m |torchrun .* -m )?pumice (.*)$")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, code) of each fenced or indented block; the language of an indented one is empty."""
    fence = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
    yield from fence.findall(text)
    for indented in re.findall(r"(?:^    [^\n]*\n)+", fence.sub("", text), re.M):
        yield "", re.sub(r"^    ", "", indented, flags=re.M)


def commands(code: str) -> Iterator[str]:
    """The lines of a block, those joined that a backslash joins, without comments."""
    for line in code.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()


def arguments(line: str) -> list[str] | None:
    """What stands behind `pumice`, as a shell would give it; None for another command."""
    match = COMMAND.match(line)
    return None if match is None else shlex.split(match[1], comments=True)


def parse(words: list[str]) -> None:
    """Have the real command line take the words apart, running nothing. Raises click's errors."""
    command, context = typer.main.get_command(app), click.Context(click.Command("pumice"))
    while isinstance(command, click.Group) or hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(click.Context(command), words)
        assert command is not None, f"there is no command {name!r}"
    command.make_context(command.name, words, parent=context)


def problem(words: list[str]) -> str:
    """Why the command line would not take the words; empty when it would."""
    if words[:1] == ["--help"] or words[:1] == ["--version"]:
        return ""
    try:
        parse(words)
    except Exception as error:  # typer brings classes of its own for the same errors
        if not type(error).__module__.startswith(("click", "typer")):
            raise
        return f"{type(error).__name__} {getattr(error, 'message', error)}"
    return ""


SAID = [
    (page, words)
    for page in PAGES
    for _, code in blocks((ROOT / page).read_text(encoding="utf-8"))
    for line in commands(code)
    if (words := arguments(line)) is not None
]
# Words that stand for other words cannot be parsed: `pumice data generate ...`.
SAID = [(page, words) for page, words in SAID if "..." not in words]


@pytest.mark.parametrize("page", sorted({page for page, _ in SAID}))
def test_every_command_exists(page: str) -> None:
    page_commands = [words for command_page, words in SAID if command_page == page]
    assert [f"{shlex.join(words)}: {message}" for words in page_commands if (message := problem(words))] == []


def mentioned(text: str) -> list[str]:
    """`pumice ...` in sentences and tables."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return [" ".join(code.split()) for code in re.findall(r"`(pumice [^`]+)`", prose)]


def wrong(line: str) -> str:
    """As `problem`, of a command that may lack what a sentence need not say: arguments, an option's value."""
    message = problem(shlex.split(line)[1:])
    return "" if message.startswith("MissingParameter") or "requires an argument" in message else message


@pytest.mark.parametrize("page", PAGES)
def test_every_mentioned_command_exists(page: str) -> None:
    lines = mentioned((ROOT / page).read_text(encoding="utf-8"))
    assert [f"{line}: {message}" for line in lines if (message := wrong(line))] == []


def test_a_wrong_mention_is_found() -> None:
    text = "`pumice data chek`, `pumice ask --quantise int4`, but not `pumice plan` or `pumice ask\n--batch`."
    assert [bool(wrong(line)) for line in mentioned(text)] == [True, True, False, False]


@pytest.mark.parametrize(
    "line",
    [
        "pumice aks dog.jpg What",
        "pumice ask dog.jpg What --moddel x",
        "pumice data chek rows.jsonl",
        "pumice export model DST",
        "pumice ask What --top-k many",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    words = arguments(line)
    assert words is not None
    assert problem(words)


# A cell of a table that holds one figure of speed, time or memory, or several.
MEASURED = re.compile(r"\|\s*[-+]?[\d.,]+ ?(GB|MB|ms|s|nats|tokens/s|rows/s|GOP/s|times)\b[^|]*(?=\|)")


def instructions() -> list[Path]:
    """The pages that say how to do something."""
    return sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", [page.name for page in instructions()])
def test_instructions_and_measurements_stand_on_pages_of_their_own(page: str) -> None:
    rows = MEASURED.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    # What `pumice plan` says beforehand, and what the server bounds, are no measurements.
    assert not rows or page in ("gpu.md", "llava-7b.md", "security.md"), rows


def test_measurements_are_found_where_they_belong() -> None:
    pages = sorted((ROOT / "docs" / "measurements").glob("*.md"))
    assert all(re.search(r"^\|.*\d", page.read_text(encoding="utf-8"), re.M) for page in pages)
    assert sum(len(MEASURED.findall(page.read_text(encoding="utf-8"))) for page in pages) > 20


def test_the_first_page_leads_to_every_other() -> None:
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = [*instructions(), *(ROOT / "docs" / "measurements").glob("*.md")]
    names = {page.relative_to(ROOT / "docs").as_posix() for page in pages} - {"index.md"}
    assert names - set(re.findall(r"\]\(([\w/.-]+\.md)", text)) == set()


def test_what_people_ask_first_has_a_page() -> None:
    """Windows and a machine without make; what a model forgets, with rows to mix in; opening notebooks."""
    setup, forgetting, notebooks = (
        (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        for name in ("setup", "forgetting", "notebooks")
    )
    for language in ("sh", "powershell"):
        code = "".join(code for kind, code in blocks(setup) if kind == language)
        assert "-m venv .venv" in code and "pip install -c constraints.txt -e ." in code
        assert not re.search(r"^make\b", code, re.M)
    (recipe,) = [yaml.safe_load(code) for kind, code in blocks(forgetting) if kind == "yaml"]
    assert len(Recipe.model_validate(recipe).data) == 2  # one's own rows, and those that are mixed in
    assert {path.name for path in (ROOT / "notebooks").glob("*.ipynb")} <= set(
        re.findall(r"notebooks/([\w.-]+\.ipynb)", notebooks)
    )


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    problems = [
        line.split()[1]
        for _, code in blocks((ROOT / page).read_text(encoding="utf-8"))
        for line in commands(code)
        if line.startswith("make ")
    ]
    assert set(problems) <= targets


def test_extras_are_installed_from_the_clone() -> None:
    """Until Pumice is published, `pip install 'pumice[serve]'` finds nothing, or another package."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]:
        names = re.findall(
            r"pip install [^`\n]*?['\"\s]pumice\[\w+\](?! @)", page.read_text(encoding="utf-8")
        )
        assert not names, page


def test_scripts_exist() -> None:
    for page in PAGES:
        for _, code in blocks((ROOT / page).read_text(encoding="utf-8")):
            for line in commands(code):
                if line.startswith("python ") and not line.startswith("python -m "):
                    assert (ROOT / line.split()[1]).is_file(), f"{page}: {line}"


def test_the_dockerfile() -> None:
    """What it copies is there and not ignored, what it starts exists; `.ci/dockerfile.py` runs its steps."""
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines():
        step, _, rest = line.partition(" ")
        if step == "COPY":
            *sources, _target = rest.split()
            assert [name for name in sources if not (ROOT / name).exists() or f"!{name}" not in ignored] == []
        if step == "CMD":
            name, *words = json.loads(rest)
            assert name == "pumice" and problem(words) == ""


def headings(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    page_headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {
        re.sub(r"[^\w\- ]", "", title.replace("`", "")).strip().lower().replace(" ", "-")
        for title in page_headings
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        target_path = (ROOT / page).parent / path if path else ROOT / page
        assert target_path.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in headings(target_path.read_text(encoding="utf-8")), f"{page} links to {target}"


def test_the_map_of_contributing_names_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("## To add something")[2].partition("## Tests")[0]
    named = [name for name in re.findall(r"`([\w./]+)`", table) if "/" in name]
    places = (ROOT, ROOT / "src" / "pumice")
    assert len(named) > 15
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


# ------------------------------------------------------------------------------------------------ run


@pytest.fixture
def working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Path, models: ModuleType
) -> Path:
    """A folder as the pages assume it: examples/, pictures and rows of one's own, tiny models.

    A local folder comes before the built-in model, or the one on the hub, that has its name.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("examples", "my-pictures"):
        shutil.copytree(ROOT / "examples", tmp_path / name)
    (tmp_path / "recipes").mkdir()
    shutil.copy(ROOT / "recipes" / "finetune.yaml", tmp_path / "recipes")  # which the example extends
    for name in ("dog.jpg", "photo.jpg"):
        shutil.copy(ROOT / "examples" / "dog.jpg", tmp_path / name)
    shutil.copy(ROOT / "examples" / "finetune.jsonl", tmp_path / "my.jsonl")
    own = {"image": "dog.jpg", "question": "Who is this?", "answers": ["Rex"], "metric": "contains"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(own) + "\n", encoding="utf-8")

    shutil.copytree(stand_in, tmp_path / "pumice-tiny")
    (tmp_path / "liuhaotian").mkdir()
    llava = models.tiny(models.ARCHITECTURES["CLIP + Llama, pad (LLaVA 1.5)"])
    export(llava, "llava", tmp_path / "liuhaotian" / "llava-v1.5-7b")
    return tmp_path


@pytest.mark.parametrize("page", RUN)
def test_commands_run(page: str, working_folder: Path) -> None:
    page_blocks = list(blocks((ROOT / page).read_text(encoding="utf-8")))
    recipes = [code for language, code in page_blocks if language == "yaml"]
    if recipes:  # the page's own recipe is the one that its commands name
        (working_folder / "my.yaml").write_text(recipes[0], encoding="utf-8")
    ran = 0
    for line in (line for language, code in page_blocks if language == "bash" for line in commands(code)):
        words = arguments(line)
        if line.startswith("printf "):
            subprocess.run(line, shell=True, check=True)
        elif words is None:
            assert line.startswith(("make ", ". .venv/")), f"{line!r} is not run by any test"
        else:
            result = CliRunner().invoke(app, words)
            allowed = (0, 1) if words[0] == "doctor" else (0,)  # which may find this machine wanting
            assert result.exit_code in allowed, f"{line}\n{result.output}"
            ran += 1
    assert ran


def test_python_blocks_run(working_folder: Path) -> None:
    for page in ("README.md", "docs/tutorial.md", "docs/asking.md"):
        for language, code in blocks((ROOT / page).read_text(encoding="utf-8")):
            if language == "python":
                shutil.copy("dog.jpg", "a.jpg")
                shutil.copy("dog.jpg", "b.jpg")
                exec(compile(code, page, "exec"), {})


# ---------------------------------------------------------------------------------------------- site


@pytest.fixture(scope="module")
def site_check(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(ROOT / "docs" / "site" / "check.py")


@pytest.mark.parametrize(
    "loaded",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<link rel="preconnect" href="https://fonts.example">',
        '<img srcset="https://example.org/a.png 2x">',
        '<div style="background: url(https://example.org/a.png)"></div>',
        "<style>@import 'https://example.org/a.css';</style>",
    ],
)
def test_what_is_fetched_from_elsewhere_is_found(site_check: ModuleType, loaded: str) -> None:
    assert len(site_check.fetched(f"<html>{loaded}</html>", ".html")) == 1


def test_what_stays_here_is_not(site_check: ModuleType) -> None:
    text = '<a href="https://example.org">there</a><img src="assets/a.png"><link rel="canonical" href="https://x">'
    assert site_check.fetched(text, ".html") == []
    assert site_check.fetched("@font-face { src: url(fonts/a.woff2) }", ".css") == []


def test_the_site(site_check: ModuleType, tmp_path: Path) -> None:
    """Built strictly: every page, link and docstring; and it fetches nothing from elsewhere."""
    if not (importlib.util.find_spec("material") and importlib.util.find_spec("mkdocstrings")):
        pytest.skip("the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environ = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert list(site_check.check(tmp_path)) == []
    commands_page = (tmp_path / "reference" / "commands.html").read_text(encoding="utf-8")
    assert "pumice data check" in commands_page


def test_every_client_that_has_a_script_has_a_row() -> None:
    scripts = {path.name for path in (ROOT / "examples" / "clients").glob("with_*")}
    page = (ROOT / "docs" / "serving.md").read_text()
    assert scripts == set(re.findall(r"^\| \[.*?\]\(\.\./examples/clients/(.*?)\)", page, re.MULTILINE))


def test_a_client_without_a_script_is_an_error() -> None:
    command = [sys.executable, ROOT / "examples" / "clients" / "run.py", "with_openai"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (process.returncode, "no with_openai beside" in process.stdout) == (2, True)


def test_every_promise_of_the_security_page_names_its_test() -> None:
    """The last cell of a row has a path, a file in tests/serve, or `make attack`, or says "calculated"."""
    lines = (ROOT / "docs" / "security.md").read_text(encoding="utf-8").splitlines()
    heads = ("promise", "what a client sends", "for", "---")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = [row for row in rows if row[0] not in heads]
    assert len(rows) > 30
    for promise, *_, shown in rows:
        named = re.findall(r"`(tests/[\w/.]+|test_\w+\.py|make attack)`", shown)
        assert named or "calculated" in shown, promise
        for name in named:
            path = ROOT / (name if name.startswith("tests/") else f"tests/serve/{name}")
            assert name == "make attack" or path.exists(), (promise, name)


def test_every_extra_is_in_the_table() -> None:
    """And no other: what `pip install -e '.[NAME]'` would not know."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = re.findall(r"^([a-z]+) = \[", section, re.MULTILINE)
    table = (ROOT / "docs/setup.md").read_text(encoding="utf-8").partition("| for | NAME |")[2]
    assert sorted(re.findall(r"^\| .*\| `([a-z]+)`", table, re.MULTILINE)) == sorted(extras)


def test_the_model_card_has_the_losses_of_the_tower() -> None:
    folder = ROOT / "src/pumice/models/pumice-tiny"
    card = " ".join((folder / "README.md").read_text(encoding="utf-8").split())
    stages = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["stages"]
    tuned = [stage["tuned_tower"] for stage in stages if "held_out_losses" in stage.get("tuned_tower", {})]
    assert tuned
    for values in tuned:
        assert "held-out loss " + ", ".join(f"{loss:.1f}" for loss in values["held_out_losses"]) in card
