"""Compiled code is made once, loaded only where nobody else can write, and not needed."""

from __future__ import annotations

import ctypes
import logging
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pumice.kernels import loader
from pumice.kernels.compiler import compile_library

KERNELS = Path(loader.__file__).parent


# Why a machine may have no compiled code. Anything else, such as C that does not compile, is a fault.
NO_COMPILER = ("PUMICE_NATIVE turns it off", "Windows is not supported", "there is no C compiler")


@pytest.fixture(autouse=True)
def compiler() -> None:
    reason = loader.compiled()[1]
    if reason in NO_COMPILER:
        pytest.skip(reason)


@pytest.mark.parametrize("weights", loader._LIBRARIES)
def test_where_there_is_a_compiler_there_is_compiled_code(weights: Any) -> None:
    """All other tests of compiled code are skipped without it, whatever the reason."""
    code, reason = loader.compiled(weights)
    assert code is not None, reason


@pytest.mark.parametrize("source", [*loader._PACKED_FILES, "-DDENSE"])
@pytest.mark.parametrize(
    ("machine", "target"),
    [
        *(
            ("x86_64", name)
            for name in ("x86-64", "ivybridge", "haswell", "skylake-avx512", "sapphirerapids")
        ),
        *(("aarch64", name) for name in ("armv8-a", "armv8.2-a+dotprod", "armv9-a")),
    ],
)
def test_every_generation_of_processors_has_its_code(machine: str, target: str, source: str) -> None:
    """What cannot be compiled for a processor leaves it without OpenMP, and so to PyTorch, in silence."""
    compiler = shutil.which("gcc" if platform.machine() == machine else f"{machine}-linux-gnu-gcc")
    if compiler is None:
        pytest.skip(f"there is no gcc for {machine}")
    arguments = [source, "decode.c"] if source.startswith("-") else [source]
    command = [compiler, "-fsyntax-only", "-fopenmp", f"-march={target}", *arguments]
    process = subprocess.run(command, cwd=KERNELS, capture_output=True, text=True, check=False)
    if "bad value" in process.stderr:
        pytest.skip(f"this gcc does not know {target}")
    assert process.returncode == 0, process.stderr


def test_a_compiler_that_knows_this_processor_by_another_option_has_threads(tmp_path: Path) -> None:
    """As some for ARM and POWER, or one that does not know it at all."""
    real = shutil.which("gcc")
    if real is None or platform.machine() != "x86_64":
        pytest.skip("needs gcc for x86-64, which takes both options")
    (tmp_path / "threads.c").write_text("int threads(void) { return _OPENMP; }")
    for number, unknown in enumerate(("-march=native", "-m*=native")):
        compiler, library_path = tmp_path / "cc", tmp_path / f"{number}.so"
        refusal = f"for option; do case $option in {unknown}) exit 1;; esac; done"
        compiler.write_text(f'#!/bin/sh\n{refusal}\nexec {real} "$@"\n')
        compiler.chmod(0o755)
        compile_library([str(compiler)], [tmp_path / "threads.c"], library_path)
        assert ctypes.CDLL(str(library_path)).threads() > 0


def test_code_that_other_users_can_write_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path))
    assert loader.compiled.__wrapped__()[0] is not None
    [library_path] = (tmp_path / "native").iterdir()
    library_path.unlink()  # never overwrite a file that this process has loaded
    library_path.write_bytes(b"not code")
    library_path.parent.chmod(0o777)
    assert loader.compiled.__wrapped__()[0] is not None  # compiled again, for this process
    assert library_path.read_bytes() == b"not code"


def test_works_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "cache"))
    with caplog.at_level(logging.INFO, "pumice"):
        assert loader.compiled.__wrapped__()[0] is None
    assert "no such option" in caplog.text
    assert not list((tmp_path / "cache" / "native").iterdir())  # no half-written file
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PUMICE_NATIVE", "off")
    assert loader.compiled.__wrapped__() == (None, "PUMICE_NATIVE turns it off")


def test_code_for_another_processor_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home folder may be shared by machines: each processor gets a library of its own."""
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path))
    assert loader.compiled.__wrapped__()[0] is not None
    [first] = (tmp_path / "native").iterdir()
    first.unlink()  # what is loaded must not be written over
    first.write_bytes(b"instructions that this processor lacks")
    first.chmod(0o700)
    monkeypatch.setattr(loader, "processor", lambda: "another")
    assert loader.compiled.__wrapped__()[0] is not None
    assert first.read_bytes() == b"instructions that this processor lacks"
    assert len(list((tmp_path / "native").iterdir())) == 2
