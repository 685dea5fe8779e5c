"""Builds the training rows of `pumice-tiny` from photographs, captions and drawn pictures.

    python projects/pumice-tiny/build.py --photos DIR --out DIR [--seed 0]

Image paths in the rows are relative to the photos folder or, for pictures drawn or copied here, to
the output folder.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from command import run
from rows import coco
from rows.attributes import colour_rows, counting_rows
from rows.base import Photo, Row
from rows.boxes import box_rows
from rows.captions import align_rows, caption_rows
from rows.coco import CATEGORIES, Scene, read_coco
from rows.composites import SHAPES, Thing, draw_scene, draw_shape, read_stamps
from rows.conversation import conversation_rows
from rows.crops import check_share, crop_pictures
from rows.describe import describe_rows
from rows.easy_vqa import easy_vqa_rows
from rows.flickr import raw_captions, read_photos, split
from rows.follow_up import follow_up_rows
from rows.happening import happening_rows
from rows.labels import coco_naming_rows, label_questions, list_rows
from rows.naming import naming_align, naming_rows, read_named
from rows.objects import object_rows
from rows.presence import Question, as_test, choose, presence_rows, presence_test
from rows.refusal import refusal_rows
from rows.scene_rows import scene_rows
from rows.text_only import text_rows
from rows.vqa import statement_rows, vqa_rows, vqa_test

COMPOSITES = {"train": 2000, "val": 100}
TEXT_ROWS = {"train": 900, "val": 60}
SEEDS = (0, 1)  # of the rows that pumice-tiny learns: README.md


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
        "objects": object_rows(photos, seed),
        "conversation": conversation_rows(photos, questions, seed),
        "refusal": refusal_rows(photos, seed),
    }


def coco_rows(scenes: Sequence[Scene], seed: int) -> dict[str, list[Row]]:
    """Rows of the COCO photographs. Pictures of statements, sides and vqa_sides may not be mirrored."""
    questions: dict[str, list[Question]] = defaultdict(list)
    chosen = label_questions(scenes, seed)
    for question in chosen:
        questions[question.photo.name].append(question)
    captioned = [scene.photo for scene in scenes if scene.photo.captions]
    vqa, vqa_numbers, vqa_sides = vqa_rows(scenes, seed)
    counted, sides = box_rows(scenes, seed)
    captions, consensus = caption_rows(captioned, seed)
    return {
        "coco_captions": captions,
        "coco_consensus": consensus,
        "coco_describe": describe_rows(captioned, seed),
        "coco_happening": happening_rows(captioned, seed),
        "coco_objects": object_rows(captioned, seed),
        "coco_colour": colour_rows(captioned, seed),
        "coco_presence": presence_rows(chosen, seed, CATEGORIES),
        "coco_list": list_rows(scenes, seed),
        "coco_naming": coco_naming_rows(scenes, seed),
        "coco_counting": counting_rows(captioned, seed) + counted,
        "coco_sides": sides,
        "coco_statements": statement_rows(scenes, seed),
        "coco_follow_up": follow_up_rows(scenes, questions, seed),
        "vqa": vqa,
        "vqa_numbers": vqa_numbers,
        "vqa_sides": vqa_sides,
    }


def build(
    photos_root: Path,
    out: Path,
    seed: int = 0,
    stamps: Path | None = None,
    easy_vqa: Path | None = None,
    composites: Mapping[str, int] = COMPOSITES,
    validation: int = 500,
    coco_validation: int = coco.VALIDATION_PHOTOS,
    cropped: float = 0,
) -> dict[str, dict[str, int]]:
    """Write every file below `out`; returns {"train/captions": {"rows": ..., "pictures": ...}, ...}.

    cropped: share of photographs that training rows show as crops, where `rows.crops` allows it. Raises
    InputError.
    """
    check_share(cropped)
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
        seeds = () if part == "train" else {*SEEDS, seed}
        learned = [entry for each in seeds for entry in text_rows(each, "train", TEXT_ROWS["train"])]
        rows["text_only"] = text_rows(seed, part, TEXT_ROWS[part], learned)
        sources |= {f"{part}/{source}": source_rows for source, source_rows in rows.items()}
    training, held_out = coco.split(read_coco(photos_root), coco_validation)
    for part, scenes in (("train", training), ("val", held_out)):
        sources |= {f"{part}/{source}": rows for source, rows in coco_rows(scenes, seed).items() if rows}
    named = read_named(photos_root)
    sources["train/align"] += naming_align(named, seed)
    sources["train/naming"] = naming_rows(named, seed)
    if easy_vqa is not None:
        sources["train/easy_vqa"] = easy_vqa_rows(easy_vqa, out, seed)
    sources["val/presence_rows"] = sources["val/presence"]
    sources["val/presence"] = presence_test(held, seed)
    if held_out:
        sources["val/coco_presence_rows"] = sources.get("val/coco_presence", [])  # none without labels
        sources["val/coco_presence"] = as_test(
            label_questions(held_out, seed), CATEGORIES, seed, "coco-presence"
        )
        sources["val/vqa_test"] = vqa_test(held_out)
    crop_pictures(sources, photos_root, out, cropped, seed)
    summary = write(sources, out)
    written = raw_captions(photos_root)
    write_captions(out / "val" / "captions.json", {photo.image: written[photo.image] for photo in held})
    if held_out:
        photo_captions = {
            scene.photo.image: list(scene.raw_captions) for scene in held_out if scene.raw_captions
        }
        write_captions(out / "val" / "coco_captions.json", photo_captions)
    return summary


def write_captions(path: Path, captions: Mapping[str, Sequence[str]]) -> None:
    """[{"image", "captions"}], captions as they were written."""
    rows = [{"image": image, "captions": texts} for image, texts in captions.items()]
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
        "--photos", type=Path, required=True, help="holds flickr8k/, imagenet-one-per-class/ and coco/"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="where train/, val/ and composites/ are written"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stamps", type=Path, help="unpacked Tux Paint stamps, for composites of real things"
    )
    parser.add_argument("--easy-vqa", type=Path, help="unpacked easy_vqa package; its test split is not read")
    parser.add_argument(
        "--cropped", type=float, default=0, help="share of photographs shown as crops (0 to 1)"
    )
    options = parser.parse_args()
    for name, counts in build(
        options.photos,
        options.out,
        options.seed,
        options.stamps,
        options.easy_vqa,
        cropped=options.cropped,
    ).items():
        print(f"{name:24} {counts['rows']:7} rows {counts['pictures']:6} pictures")


if __name__ == "__main__":
    run(main)
