"""Checks of the cache of downloaded parts and of the hub's cache."""

from __future__ import annotations

import os

from pumice.cli.checks.finding import Finding, format_count, format_size


def caches() -> list[Finding]:
    """Check the folder of downloaded parts, each part in it, and the cache of the hub."""
    from pumice.files import cache_folder, folder_size
    from pumice.storage.download import WHEELS, cached, is_intact

    folder = cache_folder().absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if os.access(nearest, os.W_OK):
        findings = [Finding("pumice", f"{folder}, {format_size(folder_size(folder))}", value=str(folder))]
    else:
        remedy = "set PUMICE_CACHE to a folder that you may write to"
        findings = [Finding("pumice", f"{nearest} cannot be written to", "problem", remedy, str(folder))]
    findings.append(_copies())
    for name, part in WHEELS.items():
        path = cached(part)
        if path is None:
            remedy = 'it is fetched when pumice-tiny is first used: pumice ask "Hello"'
            findings.append(Finding(name, "not fetched yet", "note", remedy, value="absent"))
        elif is_intact(part, path):
            says = f"{format_size(path.stat().st_size)}, SHA-256 as pinned"
            findings.append(Finding(name, says, value="intact"))
        else:
            remedy = f"delete {part.folder}; it is fetched again when it is needed"
            findings.append(Finding(name, "is damaged: its SHA-256 differs", "problem", remedy, "damaged"))
    remains = list((folder / "wheels").glob(".fetch-*"))
    if remains:
        says = f"{format_size(sum(map(folder_size, remains)))} of downloads that were interrupted"
        remedy = f"delete {folder / 'wheels'}/.fetch-* when no Pumice is fetching"
        findings.append(Finding("remains", says, "note", remedy))
    return [*findings, _hub_cache()]


def _copies() -> Finding:
    """Check the matrices that are kept in the layout of the kernels, of GGUF files and built-in models."""
    from pumice.errors import InputError
    from pumice.files import folder_size
    from pumice.formats.pumice.quantized import LIMIT_VARIABLE, cache_limit, copies_folder

    folder = copies_folder().absolute()
    count = len(list(folder.iterdir())) if folder.is_dir() else 0
    size = folder_size(folder)
    try:
        limit = cache_limit()
    except InputError as error:
        return Finding("copies", str(error), "problem", f"unset {LIMIT_VARIABLE}, or set it to 20", size)
    says = (
        f"{format_count(count, 'folder')} of quantised weights in {folder}, {format_size(size)} of at most "
    )
    says += f"{format_size(limit)} ({LIMIT_VARIABLE}); what you delete there is made again when it is used"
    return Finding("copies", says, value=size)


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
    remedy = "delete that folder; it is fetched again when it is needed"
    return Finding("hub", f"{says}; {damaged[0].splitlines()[0]}", "note", remedy, scanned.size_on_disk)
