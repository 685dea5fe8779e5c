"""Rows with videos: they train as their frames do, and what cannot be used is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from outcomes import losses
from PIL import Image
from safetensors.torch import load_file

from pumice.conversation import Video
from pumice.formats.pumice import folder as model_folder
from pumice.media import VideoPolicy
from pumice.train import run
from pumice.video import PICTURE_FRAMES, read_frames

COLOURS = [(200, 20, 20), (20, 160, 40), (20, 40, 200), (230, 220, 30)]


def write_rows(folder: Path, kind: str) -> None:
    """Two rows about a video, and the same about its frames as pictures."""
    videos, pictures = [], []
    for number in range(2):
        shown = [Image.new("RGB", (64, 64), COLOURS[number + n]) for n in range(3)]
        path = folder / f"{number}.{kind}"
        shown[0].save(path, save_all=True, append_images=shown[1:], duration=200, lossless=True)
        names = []
        for n, frame in enumerate(read_frames(Video(path), None).images):
            names.append(f"{number}-{n}.png")
            (folder / names[-1]).write_bytes(frame)
        answer = {"from": "gpt", "value": ["red", "green"][number]}
        turns = [{"from": "human", "value": "<video>\nWhat comes first?"}, answer]
        videos.append({"id": str(number), "video": path.name, "conversations": turns})
        turns = [{"from": "human", "value": "<image>\n" * 3 + "What comes first?"}, answer]
        pictures.append({"id": str(number), "image": names, "conversations": turns})
    for name, rows in (("videos", videos), ("pictures", pictures)):
        (folder / f"{name}.json").write_text(json.dumps(rows))


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_a_video_trains_as_its_frames_do(kind: str, make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    write_rows(tmp_path, kind)
    options: dict[str, Any] = {
        "pictures": [str(tmp_path)],
        "epochs": 3,
        "stage": {"learn": {"connector": 1e-3}},
    }
    cache = tmp_path / "cache"
    trained = []
    for name in ("videos", "pictures"):
        data = [{"rows": str(tmp_path / f"{name}.json")}]
        trained.append(run(make_recipe(name, data=data, feature_cache=str(cache), **options)))
    assert losses(tmp_path / "videos") == losses(tmp_path / "pictures")
    one, other = (load_file(folder / "model.safetensors") for folder in trained)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    # A frame has the key of the same picture: four different ones were computed in both runs.
    assert len((cache / "keys.txt").read_text().splitlines()) == 4
    # The folder knows how many pictures a row showed.
    known = [json.loads((folder / "config.json").read_text())["trained_pictures"] for folder in trained]
    assert known == [PICTURE_FRAMES, 3]


def test_smolvlm2_learns_with_the_times_of_frames(
    models: ModuleType, make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    write_rows(tmp_path, "gif")
    loaded = models.tiny(models.ARCHITECTURES["SigLIP, split (SmolVLM)"])
    policy = VideoPolicy(max_frames=3, fps=10.0, longest_edge=56, timestamps=True)
    config = replace(loaded.config, video=policy)
    state = {name: tensor.read() for name, tensor in loaded.state.items()}
    model_folder.save(tmp_path / "base", config, state, tokenizer=loaded.tokenizer.to_str())
    data = [{"rows": str(tmp_path / "videos.json")}]
    trained = run(
        make_recipe(
            model=str(tmp_path / "base"), data=data, pictures=[str(tmp_path)], epochs=20, pack_tokens=512
        )
    )
    assert trained.is_dir()
    first, *_, last = losses(tmp_path / "run")
    assert last < 0.5 * first
