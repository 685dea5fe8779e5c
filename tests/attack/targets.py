"""What the attacks begin with: a tiny model in every format that is read, rows, pictures, a recipe."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from architectures import ARCHITECTURES, tiny

from pumice.formats.pumice import folder
from pumice.train import checkpoint as checkpoints
from pumice.train.features import FeatureCache

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


def make_videos(path: Path) -> list[Path]:
    """Write an animation, and a film in every container that is read, where PyAV is there."""
    path.mkdir()
    pictures = [Image.new("RGB", (64, 48), colour) for colour in COLOURS.values()]
    for name in ("a.gif", "a.webp"):
        pictures[0].save(path / name, save_all=True, append_images=pictures[1:], duration=200)
    if importlib.util.find_spec("av") is not None:
        import av

        for container, codec in (("matroska", "mpeg4"), ("mp4", "mpeg4"), ("avi", "mpeg4"), ("flv", "flv1")):
            with av.open(str(path / f"a.{container}"), "w", format=container) as film:
                stream = film.add_stream(codec, rate=5)
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
                for picture in pictures * 5:
                    film.mux(stream.encode(av.VideoFrame.from_image(picture)))
                film.mux(stream.encode())
    return sorted(path.iterdir())


def make_adapter(path: Path, base: Path) -> Path:
    """Write a LoRA of PEFT's for a folder of transformers."""
    path.mkdir()
    width = json.loads((base / "config.json").read_text())["text_config"]["hidden_size"]
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    shapes = {"A": (2, width), "B": (width, 2)}
    save_file(
        {f"{name}.lora_{side}.weight": torch.ones(shape) / 9 for side, shape in shapes.items()},
        path / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "bias": "none",
        "target_modules": ["q_proj"], "base_model_name_or_path": str(base), "use_rslora": False,
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config, indent=1))
    return path


LEARNED = {"a": (3, 4), "b": (5,)}  # what the run of the checkpoints trains


def point(step: int) -> checkpoints.Checkpoint:
    """Return the state of a small run after a step: every value of it is the step's number."""
    weights = {name: torch.full(shape, float(step)) for name, shape in LEARNED.items()}
    return checkpoints.Checkpoint(
        step=step,
        weights=weights,
        moments={f"exp_avg.{name}": weight for name, weight in weights.items()},
        plain={f"step.{name}": float(step) for name in weights},
        rng={"cpu": torch.get_rng_state()},
        recipe={"seed": 1, "stage": {"learn": {"decoder": 1e-3}}},
        progress={"tokens": step, "skipped": {}},
    )


def make_run(path: Path) -> Path:
    """Write two checkpoints and the metrics of a run."""
    for step in (1, 2):
        checkpoints.save(path / "checkpoints", point(step), keep_last=2)
    events: list[dict[str, Any]] = [{"step": step, "loss": 1 / step, "tokens": 9} for step in range(1, 9)]
    events += [{"step": 8, "held_out_loss": 0.5}]
    events += [{"step": 8, "question": "What?", "reference": "red", "answer": "red"}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


FEATURES = {f"{number:032x}": torch.full((1 + number % 2, 3, 2), float(number)) for number in range(6)}


def make_cache(path: Path) -> Path:
    """Write a cache of features."""
    cache = FeatureCache(path, "tower", 3, 2)
    for key, features in FEATURES.items():
        cache.put(key, features)
    cache.close()
    (path / ".lock").unlink()
    return path


def make_predictions(path: Path) -> Path:
    """Write a file of answers as a benchmark takes it."""
    rows = [{"question_id": n, "prompt": "What?", "text": "red", "model_id": "tiny"} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
