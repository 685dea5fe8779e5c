"""Write LoRA adapters as PEFT's files: adapter_config.json and adapter_model.safetensors.

The base is the model that `hf.write` writes without adapters (`--to hf --drop-lora`), as transformers 4.52
and newer build it. Its fingerprint is in `base.json`, so that another base can be refused.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from pumice.config import ModelConfig
from pumice.formats import names as tensor_names
from pumice.formats.hf import refusal as hf_refusal
from pumice.formats.hf import write as hf_write
from pumice.storage.json_file import write_json
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import LazyStateDict, write_weights

BASE = "base.json"
_SAMPLES = 64
_SUFFIXES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}


def refusal(config: ModelConfig) -> str | None:
    """Return why there is no adapter to write; None if there is one."""
    if config.lora is None:
        return "it has no LoRA adapters"
    return hf_refusal.refusal(config)  # PEFT puts the adapters onto that model


def write(folder: Path, model: LoadedParts) -> None:
    """Write a folder with the model's adapters alone."""
    # 1. The names of the adapters: PEFT puts its own prefix before those of transformers' modules.
    config, lora = model.config, model.config.lora
    assert lora is not None
    names = tensor_names.inverse(tensor_names.hf_decoder(config.decoder))
    language = "language_model" if config.marks is None else "text_model"  # the module in transformers
    adapters: LazyStateDict = {}
    for name, tensor in model.state.items():
        layer, _, kind = name.removeprefix("decoder.").rpartition(".")
        if kind in _SUFFIXES:
            peft_name = names[f"{layer}.weight"].removeprefix("model.").removesuffix(".weight")
            adapters[f"base_model.model.model.{language}.{peft_name}.{_SUFFIXES[kind]}"] = tensor
    # 2. The config. PEFT finds the layers by a pattern of their names.
    targets = "|".join(f"{target}_proj" for target in lora.targets)
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,  # only the user knows where it is
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        # Only in the language model: the tower's layers have the same names.
        "target_modules": rf".*{language}\..*\.({targets})",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    write_weights(folder, adapters, "adapter_model")
    write_json(folder / "adapter_config.json", values)
    exported = hf_write.with_media_tokens(model)
    write_json(folder / BASE, {"fingerprint": fingerprint(exported.state)})


def fingerprint(state: LazyStateDict) -> str:
    """Return a checksum of a decoder: up to 64 values of every tensor but adapters', in fp32."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(name for name in state if name.startswith("decoder.") and ".lora_" not in name):
        values = state[name].read().reshape(-1)
        # linspace computes in fp32, as for every fingerprint so far. Above 2^24 values it rounds the last
        # position past the end.
        positions = torch.linspace(0, len(values) - 1, min(_SAMPLES, len(values))).round().long()
        positions = positions.clamp(max=len(values) - 1)
        digest.update(name.encode() + values[positions].float().numpy().tobytes())
    return digest.hexdigest()
