"""Write rows, pictures and videos of any source as LLaVA JSON Lines, as parquet, or as WebDataset shards."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

from PIL import Image as Pillow

from pumice.conversation import StoredImage, Video
from pumice.data.pictures import Image
from pumice.data.rows import ImageFinder, Row, Rows, to_llava
from pumice.data.sources.columns import arrow
from pumice.data.sources.tars import VIDEO_ENDINGS
from pumice.errors import InputError, check_known, counted
from pumice.files import replacing
from pumice.images import is_video, read_image
from pumice.jsonl import parse_json

MANIFEST = "convert.json"
ROWS = "rows.jsonl"  # of LLaVA's form, whose readers want one file
# Of a row group, which is in memory as a whole: its rows, and the bytes of their pictures and videos.
_GROUP, _GROUP_BYTES = 100, 64 << 20

# Of each row: its number in the source, the row, and the bytes of its files, pictures and videos, in order.
Shard = Iterator[tuple[int, Row, list[bytes]]]


def convert(
    rows: Rows,
    out: Path,
    form: str,
    finder: ImageFinder,
    *,
    rows_per_file: int = 1000,
    max_bad_rows: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Counter[str]:
    """Write rows into the folder `out`, and return counts of what was done.

    form: a key of `WRITERS`. Files are written completely or not at all, `rows_per_file` rows each, so that
    the same call continues where an earlier one was interrupted. The source does not change. Rows that cannot
    be used are left out. progress: called with the number of rows that are done. Raises InputError when there
    are more than `max_bad_rows` of these, or `out` holds anything else.
    """
    check_known(form, WRITERS, f"there is no form {form!r}")
    # 1. Refuse what cannot be done before anything is written.
    if form == "parquet":
        arrow()
    bad = rows.bad_rows(finder)
    if (count := int(bad.sum())) > max_bad_rows:
        first = int(bad.argmax())
        raise InputError(
            f"{counted(count, 'row')} cannot be used, {max_bad_rows} may be left out; "
            f"the first: {_why(rows, first, finder)}"
        )
    manifest = {"rows": len(rows), "digest": rows.contents.digest, "to": form, "rows_per_file": rows_per_file}
    _claim(out, manifest, rows)
    done = Counter({"rows written": len(rows) - count, "rows left out": count})
    if form == "llava" and (out / ROWS).exists():  # it is written last
        for path in out.glob("rows-*.jsonl"):
            path.unlink()
        progress(len(rows))
        return done
    # 2. Write the files that are not there yet.
    suffix, write = WRITERS[form]
    names = []
    for number, start in enumerate(range(0, len(rows), rows_per_file)):
        end = min(start + rows_per_file, len(rows))
        path = out / f"rows-{number:05}{suffix}"
        names.append(path)
        if not path.exists():
            shard = [(n, rows[n]) for n in range(start, end) if not bad[n]]
            with replacing(path) as file:
                write(_with_pictures(shard, finder), file.buffer, out)
        progress(end)
    # 3. Join the parts of LLaVA's form.
    if form == "llava":
        with replacing(out / ROWS) as file:
            for path in names:
                file.write(path.read_text("utf-8"))
        for path in names:
            path.unlink()
    return done


def _why(rows: Rows, index: int, finder: ImageFinder) -> str:
    try:
        rows[index].conversation(finder)
    except InputError as error:
        return str(error)
    return f"row {index + 1}"


def _claim(out: Path, manifest: dict[str, Any], rows: Rows) -> None:
    """Make the folder, or accept one in which the same conversion was interrupted."""
    known = out / MANIFEST
    if known.is_file():
        if parse_json(known.read_bytes()) != manifest:
            raise InputError(
                f"{out} holds another conversion, or '{rows.label}' has changed; name a new folder"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty; name a new folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(known) as file:
            json.dump(manifest, file)
    for left in out.glob(".rows-*"):  # of a run that was killed
        left.unlink()


def _with_pictures(shard: Sequence[tuple[int, Row]], finder: ImageFinder) -> Shard:
    for number, row in shard:
        found = [row.find(image, finder) for image in row.image]
        yield number, row, [read_image(file.file if isinstance(file, Video) else file) for file in found]


def _write_llava(shard: Shard, file: IO[bytes], out: Path) -> None:
    for _, row, pictures in shard:
        names = [_name(image, data) for image, data in zip(row.image, pictures, strict=True)]
        for name, data in zip(names, pictures, strict=True):
            path = out / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as picture:
                    picture.buffer.write(data)
        file.write(json.dumps(to_llava(row, names), ensure_ascii=False).encode("utf-8", "replace") + b"\n")


def _write_parquet(shard: Shard, file: IO[bytes], out: Path) -> None:
    pa = arrow()
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    medium = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    objects = pa.struct(
        [("ref", pa.list_(pa.string())), ("bbox", pa.list_(pa.list_(pa.float64()))),
         ("bbox_type", pa.string()), ("image_id", pa.list_(pa.int64()))]
    )  # fmt: skip
    schema = pa.schema(
        [("id", pa.string()), ("images", pa.list_(medium)), ("videos", pa.list_(medium)),
         ("conversations", pa.list_(turn)), ("objects", objects)]
    )  # fmt: skip
    with pa.parquet.ParquetWriter(file, schema) as writer:
        group: list[dict[str, Any]] = []
        size = 0
        for _, row, files in shard:
            media: dict[str, list[dict[str, Any]]] = {"images": [], "videos": []}
            for image, data in zip(row.image, files, strict=True):
                named = {"bytes": data, "path": _name(image, data)}
                media["videos" if isinstance(image, Video) else "images"].append(named)
            written = to_llava(row)
            group.append(
                {"id": row.id, **media, "conversations": written["conversations"],
                 "objects": written.get("objects")}
            )  # fmt: skip
            size += sum(map(len, files))
            if len(group) == _GROUP or size >= _GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(group, schema))
                group, size = [], 0
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema))


def _write_tar(shard: Shard, file: IO[bytes], out: Path) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

        for number, row, files in shard:
            values = {key: value for key, value in to_llava(row).items() if key not in ("image", "video")}
            add(f"{number:09}.json", json.dumps(values, ensure_ascii=False).encode("utf-8", "replace"))
            for n, (image, data) in enumerate(zip(row.image, files, strict=True)):
                which = f"{n}." if len(files) > 1 else ""
                ending = _video_ending(image, data) if isinstance(image, Video) else _ending(data)
                add(f"{number:09}.{which}{ending}", data)


# Form -> the ending of its files, and what writes one.
WRITERS: dict[str, tuple[str, Callable[[Shard, IO[bytes], Path], None]]] = {
    "llava": (".jsonl", _write_llava),
    "parquet": (".parquet", _write_parquet),
    "webdataset": (".tar", _write_tar),
}


def _name(image: Image, data: bytes) -> str:
    """Return the name of a picture in the copy: its own below `images`, or one from its contents."""
    ending = ""
    if isinstance(image, Video):
        ending = PurePosixPath(image.name).suffix.lstrip(".") or "mp4"
        image = image.source if isinstance(image.source, StoredImage) else image.name
    if isinstance(image, str):
        pure = PurePosixPath(image.replace(os.sep, "/"))
        if not pure.is_absolute() and ".." not in pure.parts and ":" not in image:
            return f"images/{pure}"
    name = hashlib.blake2b(data, digest_size=8).hexdigest()
    return f"images/{name[:2]}/{name}.{ending or _ending(data)}"


def _video_ending(video: Video, data: bytes) -> str:
    """Return the ending of a video in an archive, by which it is told from a picture."""
    if not is_video(data) and VIDEO_ENDINGS.fullmatch(animation := f"video.{_ending(data)}"):
        return animation
    ending = PurePosixPath(video.name).suffix.lstrip(".").lower()
    return ending if VIDEO_ENDINGS.fullmatch(ending) else "mp4"


def _ending(data: bytes) -> str:
    """Return the ending of a picture's file by its contents."""
    try:
        with Pillow.open(io.BytesIO(data)) as image:
            kind = (image.format or "").lower()
    except Exception:  # decoders raise anything; what is wrong is told when the picture is opened
        kind = ""
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif", "": "jpg"}.get(kind, kind)
