"""Run scripts of real clients against `pumice serve`, and print a table; ends with 1 if one of them fails.

`make clients` installs the clients and runs all. With names as arguments, only those scripts run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build"
# Scripts whose packages do not fit beside the others -> their environment.
ENVIRONMENTS = {"with_inspect.py": "clients-inspect"}
SECONDS = 300  # the longest time of one script
# Nothing is sent elsewhere: no traces, no statistics, no check for newer versions.
QUIET = {
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "NO_COLOR": "1",
}


def main(names: list[str]) -> int:
    scripts = sorted([*HERE.glob("with_*.py"), *HERE.glob("with_*.mjs")])
    if unknown := sorted({*names} - {script.name for script in scripts}):
        print("there is no", *unknown, "beside", *(script.name for script in scripts))
        return 2
    scripts = [script for script in scripts if not names or script.name in names]
    command = [sys.executable, "-m", "pumice", "serve", "--port", "0", "--log", "json"]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server,
        ThreadPoolExecutor(1) as reader,
    ):
        try:
            assert server.stderr is not None
            lines = (json.loads(line) for line in server.stderr if line.startswith("{"))
            host = next((line["url"] for line in lines if line["message"] == "listening"), None)
            if host is None:
                print("the server did not start; `pumice serve` says why")
                return 1
            reader.submit(deque, server.stderr, 0)  # a full pipe would stop the server
            failed = [script.name for script in scripts if not run(script, host)]
        finally:
            server.terminate()
    print(f"{len(scripts) - len(failed)} of {len(scripts)} clients work", *failed)
    return bool(failed)


def run(script: Path, host: str) -> bool:
    """Run one script and print what it says. Return whether it worked."""
    env = {**os.environ, **QUIET, "PUMICE_HOST": host, "PUMICE_DOG": str(HERE.parent / "dog.jpg")}
    python = BUILD / ENVIRONMENTS.get(script.name, "clients") / "bin" / "python"
    command = [str(python), str(script)]
    if script.suffix == ".mjs":  # node looks for packages beside the script
        copies = BUILD / "clients-js"
        for module in HERE.glob("*.mjs"):
            (copies / module.name).write_text(module.read_text())
        command = ["node", str(copies / script.name)]
    print(f"--- {script.name}", flush=True)
    try:
        status = subprocess.run(command, env=env, timeout=SECONDS, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"not done within {SECONDS} s")
        return False
    return status == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
