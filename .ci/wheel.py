"""Build the wheel, install it into an empty environment, and give README's commands in an empty folder.

    python .ci/wheel.py [--wheel FILE] [--environment FOLDER]

Each command must work, or end with status 2 and one sentence that says what is missing: the source tree is
not there. With a photograph, the question about it must be answered. --wheel: one that is built already.
--environment: one that has the wheel already. TORCH_INDEX: where the CPU build of PyTorch may be.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Beside README's: what needs recipes and tables that a wheel has to hold, and what lacks a file or a library.
WORKING = (
    "pumice --version",
    "pumice eval --list",
    "pumice plan pumice:llava-1.5/2-lora-7b --gpu a100-80g --rows 1000",
)
LACKING = ("pumice train pumice:finetun", "pumice data show rows.jsonl", "pumice serve --port 0")


def build(folder: Path) -> Path:
    """Build a source distribution, and the wheel from it, with tools of their own."""
    tools = folder / "tools"
    venv.create(tools, with_pip=True)
    subprocess.run([tools / "bin" / "python", "-m", "pip", "install", "-q", "build"], check=True)
    subprocess.run([tools / "bin" / "python", "-m", "build", "-o", folder / "dist", ROOT], check=True)
    [wheel] = (folder / "dist").glob("*.whl")
    return wheel


def install(wheel: Path, environment: Path) -> None:
    venv.create(environment, with_pip=True)
    pip = [environment / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    constraints = ROOT / "constraints.txt"
    # As the Makefile does: the CPU build of PyTorch from the default index, else from TORCH_INDEX.
    version = re.search(r"^torch==(\S+)", constraints.read_text(encoding="utf-8"), re.M)
    assert version is not None
    torch = ["--no-deps", f"torch=={version[1]}+cpu"]
    index = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
    elsewhere = ["--retries", "0", "--timeout", "15", "--index-url", index]
    if subprocess.run([*pip, *torch], check=False, stderr=subprocess.DEVNULL).returncode:
        subprocess.run([*pip, *elsewhere, *torch], check=False)
    subprocess.run([*pip, "-c", str(constraints), str(wheel)], check=True)


def said(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one sentence of a refusal; empty if there is another ending."""
    lines = result.stderr.strip().splitlines()
    refused = result.returncode == 2 and len(lines) == 1 and lines[0].startswith("pumice: ")
    return lines[0] if refused else ""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--environment", type=Path)
    options = parser.parse_args()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [
        line.removeprefix(".venv/bin/") for line in re.findall(r"^\.venv/bin/pumice .*$", readme, re.M)
    ]
    [code] = re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S)
    with tempfile.TemporaryDirectory(prefix="wheel-") as name:
        # 1. The environment, and an empty folder.
        environment = options.environment or Path(name, "environment")
        if options.environment is None:
            install(options.wheel or build(Path(name)), environment)
        bin_folder, empty = environment.resolve() / "bin", Path(name, "empty")
        empty.mkdir()

        def run(*command: str) -> subprocess.CompletedProcess[str]:
            words = [str(bin_folder / command[0]), *command[1:]]
            return subprocess.run(words, cwd=empty, capture_output=True, text=True, check=False)

        # 2. Each command works or says what is missing. `pumice doctor` may find this machine wanting.
        wrong = []
        for line in (*commands, *WORKING, *LACKING):
            result = run(*shlex.split(line))
            allowed = (0, 1) if line.startswith("pumice doctor") else (0,)
            sentence = "" if line in WORKING else said(result)
            outcome = "works" if result.returncode in allowed else sentence
            print(f"{line}: {outcome or 'WRONG'}", flush=True)
            wrong += [] if outcome else [f"{line}\n{result.stdout}{result.stderr}"]
        # 3. So does the code; with a photograph, it and the question are answered.
        first = run("python", "-c", code)
        if "InputError: picture 'examples/dog.jpg' does not exist" not in first.stderr:
            wrong.append(f"the code without its picture\n{first.stdout}{first.stderr}")
        (empty / "examples").mkdir()
        for photo in ("photo.jpg", "examples/dog.jpg"):
            shutil.copy(ROOT / "examples" / "dog.jpg", empty / photo)
        for result in (run("python", "-c", code), run(*shlex.split(commands[0]))):
            print(f"answered: {result.stdout.strip()}", flush=True)
            wrong += [] if result.returncode == 0 and result.stdout.strip() else [result.stderr]
    print("\n\n".join(wrong) or "the wheel works without the source tree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
