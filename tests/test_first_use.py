"""The path of first use: examples/first-use.sh from its first line to its last, on tiny random models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from PIL import Image

from pumice.formats.export import export

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPT = EXAMPLES / "first-use.sh"
# What no step of a sound path may say.
MISLEADING = ("Traceback", "Warning", "outside the LLM", "no file says", "extends ../", "nats")


def test_the_path_of_first_use(tmp_path: Path, stand_in: Path, models: ModuleType) -> None:
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    shutil.copytree(stand_in, tmp_path / "pumice-tiny")  # which comes before the built-in model of its name
    export(models.tiny(models.ARCHITECTURES["CLIP + Llama, pad (LLaVA 1.5)"]), "hf", tmp_path / "llava")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"EPOCHS": "1", "STEPS": "3", "PACK_TOKENS": "256", "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(
        ["bash", SCRIPT, "./llava"], cwd=tmp_path, env=os.environ | settings, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    said = done.stdout
    assert done.returncode == 0, said
    assert said.endswith("All steps are done; what they wrote is in runs/first-use.\n")
    assert [words for words in MISLEADING if words in said] == []
    here = tmp_path / "runs" / "first-use"
    assert "80 of 80 rows can be used" in said
    metrics = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in metrics if "held_out_loss" in event] == [0, 1, 2, 3]
    assert (here / "run" / "loss.png").is_file() or "no loss.png" in said
    assert len((here / "after.jsonl").read_text().splitlines()) == 20
    for written in ("hf/model.safetensors", "llava/config.json", "page.html", "strip.png"):
        assert (here / written).is_file(), written
    assert len(list((here / "gguf").glob("*.gguf"))) == 2
    with Image.open(here / "strip.png") as strip:
        assert strip.width > 100
    log = [json.loads(line) for line in (here / "serve.log").read_text().splitlines()]
    assert [line["model"] for line in log if line["message"] == "listening"] == ["four albums"]
    assert log[-1]["message"] == "stopped"
