"""What the attacks begin with: a tiny model in every format that is read, rows, pictures, a recipe."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from architectures import ARCHITECTURES, tiny

from pumice.formats.pumice import folder

COLOURS = {"red": (200, 20, 20), "green": (20, 160, 40), "blue": (20, 40, 200), "yellow": (230, 220, 30)}


def command(*arguments: str | Path) -> list[str]:
    """Return Pumice's command line as a process of this Python."""
    return [sys.executable, "-m", "pumice", *map(str, arguments)]


def make_model(path: Path) -> Path:
    """Write a tiny LLaVA 1.5, which can be exported to every format."""
    model = tiny(ARCHITECTURES["CLIP + Llama, pad (LLaVA 1.5)"])
    state = {name: tensor.read() for name, tensor in model.state.items()}
    folder.save(path, model.config, state, tokenizer=model.tokenizer.to_str())
    return path


def make_rows(path: Path, count: int = 24) -> Path:
    """Write pictures of one colour and rows about them; return the file of the rows."""
    path.mkdir()
    lines = []
    for number in range(count):
        name = list(COLOURS)[number % 4]
        Image.new("RGB", (64, 64), COLOURS[name]).save(path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": name}]
        lines.append(json.dumps({"id": str(number), "image": f"{number}.png", "conversations": turns}) + "\n")
    (path / "rows.jsonl").write_text("".join(lines))
    return path / "rows.jsonl"


def make_recipe(path: Path, model: Path, rows: Path, output: Path) -> Path:
    """Write a recipe of some seconds that saves after every step."""
    recipe = {
        "name": path.stem, "output": str(output), "model": str(model), "pictures": [str(rows.parent)],
        "stage": {"learn": {"connector": 3e-3, "decoder": 3e-3}}, "data": [{"rows": str(rows)}],
        "epochs": 1, "batch": 2, "pack_tokens": 96, "precision": "fp32", "save_every": 1,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(recipe))
    return path


def make_pictures(path: Path) -> list[Path]:
    """Write a picture in every format that is read."""
    path.mkdir()
    picture = Image.linear_gradient("L").convert("RGB").resize((48, 40))
    names = ["a.jpg", "a.png", "a.webp", "a.gif", "a.bmp", "a.tiff", "a.ppm", "a.jp2"]
    for name in names:
        picture.save(path / name)
    return [path / name for name in names]


def make_tables(path: Path, rows: Path) -> list[Path]:
    """Write the rows as tables and archives of other formats."""
    path.mkdir()
    text = rows.read_text()
    lists = [json.loads(line) for line in text.splitlines()]
    (path / "rows.json").write_text(json.dumps(lists))
    (path / "rows.csv").write_text(
        "image,question,answer\n" + "".join(f"{n}.png,What?,red\n" for n in range(8))
    )
    for form in ("parquet", "webdataset"):
        arguments = ("data", "convert", rows, path / form, "--to", form, "--images", rows.parent)
        subprocess.run(command(*arguments), check=True, capture_output=True)
    with zipfile.ZipFile(path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", text)
    with tarfile.open(path / "a.tar", "w") as tar:
        for name in ("0.png", "1.png"):
            data = (rows.parent / name).read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    tables = [path / "rows.json", path / "rows.csv", path / "a.tar", rows]
    return [
        *tables,
        *sorted((path / "parquet").glob("*.parquet")),
        *sorted((path / "webdataset").glob("*.tar")),
    ]
