"""Checks of downloads: the caches, the settings that control downloads, and the servers."""

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
from pumice.cli.checks.finding import Finding, dir_size, existing_folder, format_size


def caches() -> list[Finding]:
    """Check the folder of downloaded parts, each part in it, and the cache of the hub."""
    from pumice.files import cache_folder
    from pumice.storage.download import WHEELS, cached, is_intact

    folder = cache_folder()
    nearest = existing_folder(folder)
    if os.access(nearest, os.W_OK):
        findings = [Finding("pumice", f"{folder}, {format_size(dir_size(folder))}", value=str(folder))]
    else:
        remedy = "set PUMICE_CACHE to a folder that you may write to"
        findings = [Finding("pumice", f"{nearest} cannot be written to", "problem", remedy, str(folder))]
    for name, part in WHEELS.items():
        path = cached(part)
        if path is None:
            remedy = 'it is fetched when pumice-tiny is first used: pumice ask "Hello"'
            findings.append(Finding(name, "not fetched yet", "note", remedy, value="absent"))
        elif is_intact(part, path):
            findings.append(
                Finding(name, f"{format_size(path.stat().st_size)}, SHA-256 as pinned", value="intact")
            )
        else:
            remedy = f"delete {part.folder}; it is fetched again when it is needed"
            findings.append(Finding(name, "is damaged: its SHA-256 differs", "problem", remedy, "damaged"))
    remains = list((folder / "wheels").glob(".fetch-*"))
    if remains:
        says = f"{format_size(sum(map(dir_size, remains)))} of downloads that were interrupted"
        remedy = f"delete {folder / 'wheels'}/.fetch-* when no Pumice is fetching"
        findings.append(Finding("remains", says, "note", remedy))
    return [*findings, _hub_cache()]


def _hub_cache() -> Finding:
    from huggingface_hub import CacheNotFound, scan_cache_dir
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        scanned = scan_cache_dir()
    except CacheNotFound:
        return Finding("hub", f"{HF_HUB_CACHE}, empty", value=0)
    count = len(scanned.repos)
    repositories = "1 repository" if count == 1 else f"{count} repositories"
    says = f"{HF_HUB_CACHE}, {format_size(scanned.size_on_disk)} in {repositories}"
    # The client also warns about its own files beside the repositories.
    damaged = [str(warning) for warning in scanned.warnings if "is not a directory" not in str(warning)]
    if not damaged:
        return Finding("hub", says, value=scanned.size_on_disk)
    reason = damaged[0].splitlines()[0]
    remedy = "delete that folder; it is fetched again when it is needed"
    return Finding("hub", f"{says}; {reason}", "note", remedy, value=scanned.size_on_disk)


def settings(environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """Report the environment variables and tools that control where parts and models come from."""
    from pumice.storage.download import WHEELS, cached

    findings = []
    for name, meaning in (
        ("HF_HUB_OFFLINE", "models of the hub come from its cache alone"),
        ("HF_ENDPOINT", "models of the hub are fetched there"),
        ("PIP_INDEX_URL", "parts of pumice-tiny are fetched there"),
        ("PIP_FIND_LINKS", "parts of pumice-tiny are looked for there as well"),
        ("HTTPS_PROXY", "everything is fetched through it"),
    ):
        setting = environ.get(name) or environ.get(name.lower(), "")
        # The address of a proxy may contain a password.
        shown = re.sub(r"//[^/@]+@", "//...@", setting)
        if setting and not (name == "HF_HUB_OFFLINE" and setting.upper() in ("0", "FALSE", "NO", "OFF")):
            findings.append(Finding(name, f"{shown}: {meaning}", value=shown))
    missing = [name for name, part in WHEELS.items() if cached(part) is None]
    pip = bool(importlib.util.find_spec("pip") or shutil.which("pip") or shutil.which("pip3"))
    if not pip and missing:
        remedy = f"run `{sys.executable} -m ensurepip`"
        findings.append(
            Finding("pip", f"is missing, and has to fetch {', '.join(missing)}", "problem", remedy)
        )
    elif not pip:
        findings.append(Finding("pip", "is missing; nothing is left for it to fetch", value=False))
    else:
        findings.append(Finding("pip", "found; it fetches the parts of pumice-tiny", value=True))
    if environ.get("PIP_NO_INDEX") and not environ.get("PIP_FIND_LINKS") and missing:
        remedy = "unset it, or name a folder with their wheels in PIP_FIND_LINKS"
        findings.append(
            Finding("PIP_NO_INDEX", f"keeps pip from fetching {', '.join(missing)}", "problem", remedy)
        )
    return findings


def connections(environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """Check whether the package index and the hub answer, with a time limit of 5 s each."""
    index = environ.get("PIP_INDEX_URL", "https://pypi.org/simple")
    hub = environ.get("HF_ENDPOINT", "https://huggingface.co")
    remedies = {
        "index": "check network and proxy, or put the wheels into a folder and name it in PIP_FIND_LINKS",
        "hub": "check network and proxy, or work from folders and set HF_HUB_OFFLINE=1",
    }
    findings = []
    for name, address in (("index", index), ("hub", hub)):
        start = time.perf_counter()
        try:
            request = urllib.request.Request(address, headers={"User-Agent": f"pumice/{__version__}"})
            with urllib.request.urlopen(request, timeout=5):
                pass
        except urllib.error.HTTPError as error:  # an error status is an answer, too
            error.close()
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            findings.append(
                Finding(name, f"{address} does not answer ({reason})", "problem", remedies[name], value=False)
            )
            continue
        says = f"{address} answers after {time.perf_counter() - start:.1f} s"
        findings.append(Finding(name, says, value=True))
    return findings
