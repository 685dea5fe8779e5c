"""Run the steps of the Dockerfile without a container engine, then start its server and ask for its health.

    python .ci/dockerfile.py

COPY, RUN, CMD and HEALTHCHECK run as written, in a folder and a virtual environment of their own; steps of
the system (apt-get) are left out. TORCH_INDEX of the environment replaces the Dockerfile's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
START_SECONDS = 300  # the first start fetches the parts of the model


def instructions(text: str) -> list[tuple[str, str]]:
    """(name, rest) of each instruction, without comments, continued lines joined."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines()
    return [(name, rest) for line in lines if line for name, _, rest in [line.partition(" ")]]


def main() -> int:
    steps = instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="image-") as name:
        work, environment = Path(name, "work"), Path(name, "venv")
        work.mkdir()
        venv.create(environment, with_pip=True)
        environ = os.environ | {"PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        commands = {}
        # 1. Copy and run, step by step. The cache of a machine's own pip and model parts serves here.
        for step, rest in steps:
            print(f"{step} {rest}", flush=True)
            if step == "ARG":
                key, _, value = rest.partition("=")
                environ.setdefault(key, value)
            elif step == "COPY":
                *sources, target = rest.split()
                for source in sources:
                    copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                    copy(ROOT / source, work / (target if (ROOT / source).is_dir() else Path(target, source)))
            elif step == "RUN" and not rest.startswith("apt-get"):
                command = rest.replace("--no-cache-dir ", "")
                subprocess.run(command, shell=True, cwd=work, env=environ, check=True)
            elif step in ("CMD", "HEALTHCHECK"):
                commands[step] = rest.removeprefix("CMD ")
        # 2. Start the server elsewhere, so that only what was installed serves, until it says that it is
        # well.
        server = subprocess.Popen(json.loads(commands["CMD"]), cwd=name, env=environ)
        try:
            end = time.monotonic() + START_SECONDS
            while subprocess.call(
                commands["HEALTHCHECK"], shell=True, env=environ, stderr=subprocess.DEVNULL
            ):
                if server.poll() is not None or time.monotonic() > end:
                    print("the server did not become healthy", file=sys.stderr)
                    return 1
                time.sleep(1)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()
    print("the steps of the Dockerfile run, and its server is healthy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
