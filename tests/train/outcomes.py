"""What a run has left: its losses, and the weights of its model."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from pumice.train.report import read_metrics


def losses(output: Path) -> list[float]:
    return [event["loss"] for event in read_metrics(output / "metrics.jsonl") if "loss" in event]


def weights(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")
