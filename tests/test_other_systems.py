"""Pumice runs where Python lacks what Linux has: a stand-in for macOS and Windows on this machine.

What their own libraries do differently it cannot show.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

# What Python has on Linux alone, and what it has on Linux and macOS.
LINUX_FUNCTIONS = ("sched_getaffinity", "sched_setaffinity", "posix_fadvise", "memfd_create", "pidfd_open")
UNIX_FUNCTIONS = (
    *("getuid", "geteuid", "getgid", "getloadavg", "nice", "sysconf", "fork", "killpg", "setsid", "uname"),
    *("fchown", "chown", "mkfifo", "statvfs", "getpgid", "getpriority", "setpriority"),
)
UNIX_MODULES = ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "readline", "syslog")
LACKING = {"darwin": (LINUX_FUNCTIONS, ()), "win32": (LINUX_FUNCTIONS + UNIX_FUNCTIONS, UNIX_MODULES)}

SCRIPT = """
# 1. Libraries, which know this system.
import asyncio, ctypes, logging, os, pathlib, shutil, signal, socket, subprocess, sys, tempfile, types
import huggingface_hub, numpy, PIL.Image, psutil, pydantic, safetensors.torch, tokenizers, torch
import starlette.applications, sysconfig, typer, uvicorn, zoneinfo

sysconfig.get_config_vars()  # it keeps them

system, functions, modules, folder, picture = (*sys.argv[1:4], pathlib.Path(sys.argv[4]), sys.argv[5])
# 2. The other system: it has no /proc and no /sys, and lacks functions and modules.
def elsewhere(real):
    def function(path, *options, **more):
        if str(path).startswith(("/proc", "/sys")):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path, *options, **more)
    return function

pathlib.Path.open = elsewhere(pathlib.Path.open)
pathlib.Path.read_text = elsewhere(pathlib.Path.read_text)
pathlib.Path.stat = elsewhere(pathlib.Path.stat)
exists, is_file = pathlib.Path.exists, pathlib.Path.is_file
pathlib.Path.exists = lambda path: not str(path).startswith(("/proc", "/sys")) and exists(path)
pathlib.Path.is_file = lambda path: not str(path).startswith(("/proc", "/sys")) and is_file(path)
for name in functions.split():
    if hasattr(os, name):
        delattr(os, name)
sys.modules.update(dict.fromkeys(modules.split()))
sys.platform = system
if system == "win32":
    sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda *_: None)

# 3. The program.
from pumice.cli import app
from pumice.files import Lock, cache_folder, replacing, sync
from pumice.serve.run import bind
from pumice.serve.settings import ServerSettings
from pumice.storage.memory import available_memory
from pumice.stopping import limit_process

app(["ask", picture, "What?", "--model", str(folder), "--max-new-tokens", "2"], standalone_mode=False)
bind(ServerSettings(port=0)).close()
limit_process(1 << 20, 1 << 45)
with replacing(folder / "text") as file:
    file.write("whole")
sync(folder)
with Lock(folder / "lock") as lock:
    assert lock.acquire()
assert available_memory() > 0
app(["doctor", "--json", "--no-test"], standalone_mode=False)
print("\\nend", cache_folder())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="stands in for the other systems")
@pytest.mark.parametrize("system", LACKING)
def test_pumice_runs_on(system: str, tiny_folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    functions, modules = map(" ".join, LACKING[system])
    # A cache of its own, without the seconds that compiling takes. Windows never compiles.
    settings = {"HOME": str(tmp_path), "LOCALAPPDATA": str(tmp_path), "PUMICE_NATIVE": "off"}
    if system == "win32":
        del settings["PUMICE_NATIVE"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, system, functions, modules, folder, tmp_path / "red.png"],
        env={key: value for key, value in os.environ.items() if key != "PUMICE_CACHE"} | settings,
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    end = {"darwin": "Library/Caches/pumice", "win32": "pumice/cache"}[system]
    assert done.stdout.rstrip().endswith(end)
