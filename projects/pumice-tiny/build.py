"""Builds the training rows of `pumice-tiny` from photographs, captions and drawn pictures.

    python projects/pumice-tiny/build.py --photos DIR --out DIR [--seed 0]

Image paths in the rows are relative to the photos folder or, for pictures drawn or copied here, to
the output folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from rows.attributes import colour_rows, counting_rows
from rows.base import Photo, Row
from rows.captions import align_rows, caption_rows
from rows.composites import SHAPES, Thing, draw_scene, draw_shape, read_stamps
from rows.conversation import conversation_rows
from rows.describe import describe_rows
from rows.easy_vqa import easy_vqa_rows
from rows.flickr import raw_captions, read_photos, split
from rows.happening import happening_rows
from rows.naming import naming_align, naming_rows, read_named
from rows.presence import Question, choose, presence_rows, presence_test
from rows.refusal import refusal_rows
from rows.scene_rows import scene_rows
from rows.text_only import text_rows

from pumice.errors import InputError

COMPOSITES = {"train": 2000, "val": 100}
TEXT_ROWS = {"train": 900, "val": 60}


def photo_rows(photos: Sequence[Photo], seed: int) -> dict[str, list[Row]]:
    """Rows of every source that needs nothing but photos and captions."""
    questions: dict[str, list[Question]] = defaultdict(list)
    chosen = choose(photos, seed)
    for question in chosen:
        questions[question.photo.name].append(question)
    captions, consensus = caption_rows(photos, seed)
    return {
        "align": align_rows(photos),
        "captions": captions,
        "consensus": consensus,
        "describe": describe_rows(photos, seed),
        "presence": presence_rows(chosen, seed),
        "counting": counting_rows(photos, seed),
        "colour": colour_rows(photos, seed),
        "happening": happening_rows(photos, seed),
        "conversation": conversation_rows(photos, questions, seed),
        "refusal": refusal_rows(photos, seed),
    }


def build(
    photos_root: Path,
    out: Path,
    seed: int = 0,
    stamps: Path | None = None,
    easy_vqa: Path | None = None,
    composites: Mapping[str, int] = COMPOSITES,
    validation: int = 500,
) -> dict[str, dict[str, int]]:
    """Write every file below `out`; returns {"train/captions": {"rows": ..., "pictures": ...}, ...}."""
    train, held = split(read_photos(photos_root), validation)
    cut_outs = read_stamps(stamps) if stamps else []
    things = [*cut_outs, *(Thing(name, "red", draw_shape(name, "red", 16)) for name in SHAPES)]
    sources: dict[str, list[Row]] = {}
    for part, photos in (("train", train), ("val", held)):
        rows = photo_rows(photos, seed)
        drawn = [
            draw_scene(number, part, photos, photos_root, out, cut_outs, seed)
            for number in range(composites.get(part, 0))
        ]
        for source, added in scene_rows(drawn, things, seed).items():
            rows[source] = rows.get(source, []) + added
        rows["text_only"] = text_rows(seed, part, TEXT_ROWS[part])
        sources |= {f"{part}/{source}": found for source, found in rows.items()}
    named = read_named(photos_root)
    sources["train/align"] += naming_align(named, seed)
    sources["train/naming"] = naming_rows(named, seed)
    if easy_vqa is not None:
        sources["train/easy_vqa"] = easy_vqa_rows(easy_vqa, out, seed)
    sources["val/presence_rows"] = sources["val/presence"]
    sources["val/presence"] = presence_test(held, seed)
    summary = write(sources, out)
    written = raw_captions(photos_root)
    captions = [{"image": photo.image, "captions": written[photo.image]} for photo in held]
    (out / "val" / "captions.json").write_text(
        json.dumps(captions, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return summary


def write(sources: Mapping[str, Sequence[Row]], out: Path) -> dict[str, dict[str, int]]:
    """One JSONL file per source, and summary.json."""
    summary = {}
    for name, rows in sources.items():
        path = out / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        summary[name] = {"rows": len(rows), "pictures": len({r["image"] for r in rows if "image" in r})}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds the training rows of pumice-tiny.")
    parser.add_argument(
        "--photos", type=Path, required=True, help="holds flickr8k/ and imagenet-one-per-class/"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="where train/, val/ and composites/ are written"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stamps", type=Path, help="unpacked Tux Paint stamps, for composites of real things"
    )
    parser.add_argument("--easy-vqa", type=Path, help="unpacked easy_vqa package; its test split is not read")
    options = parser.parse_args()
    for name, counts in build(
        options.photos, options.out, options.seed, options.stamps, options.easy_vqa
    ).items():
        print(f"{name:24} {counts['rows']:7} rows {counts['pictures']:6} pictures")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
