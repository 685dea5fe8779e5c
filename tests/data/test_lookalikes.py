"""A held-out picture that is also learned is told, as it is and in another size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from samples import Examples, llava

from pumice.data.check import check
from pumice.data.images import Looks
from pumice.data.lookalikes import Lookalikes
from pumice.data.rows import ImageFinder, Rows


def test_pictures_of_train_and_held_out_are_compared(examples: Examples, tmp_path: Path) -> None:
    pytest.importorskip("imagehash")
    rows = llava(examples.rows[:12], tmp_path / "train.json")
    held_out = [json.loads((tmp_path / "train.json").read_text())[0] | {"image": name} for name in "abc"]
    with Image.open(examples.folder / "02.png") as image:
        image.resize((52, 40)).save(examples.folder / "b.jpg", quality=85)
    (examples.folder / "a.png").write_bytes((examples.folder / "01.png").read_bytes())
    (examples.folder / "c.png").write_bytes((examples.folder / "11.png").read_bytes())
    (tmp_path / "held.json").write_text(json.dumps(held_out))
    report = check([rows], ImageFinder(examples.folder), held_out=[Rows(tmp_path / "held.json")])
    assert [(p.source, p.row, p.kind) for p in report.problems] == [
        ("held", 1, "also learned"), ("held", 2, "also learned"),
    ]  # fmt: skip
    assert report.problems[0].reason == "its picture is that of row 3 of 'train'; keep it in one of them"
    assert report.problems[1].reason.startswith("its picture looks like that of row 5 of 'train'")
    assert report.ok and report.usable == report.rows == 12


def test_hashes_within_four_bits_are_found() -> None:
    lookalikes = Lookalikes()
    lookalikes.add(Looks(b"a", 0, 1.0), "a")
    found = {
        bits: lookalikes.find(Looks(b"b", sum(1 << (13 * n) for n in range(bits)), 1.0))[1]
        for bits in range(6)
    }
    assert [bits for bits, name in found.items() if name] == [0, 1, 2, 3, 4]
    assert lookalikes.find(Looks(b"b", 0, 1.5)) == ("", "")  # another shape
    assert lookalikes.find(Looks(b"a", None, 1.0)) == ("is", "a")
    assert lookalikes.find(Looks(b"b", None, 1.0)) == ("", "")
