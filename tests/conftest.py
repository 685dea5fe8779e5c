"""What every test gets: few threads, no network beyond this machine, the same examples each run."""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tokenizers
from hypothesis import settings

# Before torch is imported: results to the last bit depend on the number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("pumice", deadline=None, derandomize=True, database=None)
settings.load_profile("pumice")


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """A connection to anything but this machine is an error that names the address."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to connect to {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="session")
def models() -> ModuleType:
    """benchmarks/architectures.py: tiny random models of every architecture."""
    return _benchmark("architectures")


@pytest.fixture(scope="session")
def formats() -> ModuleType:
    """benchmarks/formats.py: exporting them, and running them elsewhere."""
    return _benchmark("formats")


@pytest.fixture(scope="session")
def sentencepiece_file() -> Path:
    """A real SentencePiece model, that of Mistral 7B, in the package mistral-common (not imported)."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("mistral-common is not installed")
    return Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"


def _benchmark(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module(name)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder like any other, small and random: 4 image tokens, a byte-level vocabulary, ChatML."""
    import torch

    from pumice.config import ConnectorConfig, DecoderConfig, ModelConfig, VisionConfig
    from pumice.model.llava import Llava
    from pumice.weights.folder import save

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant system What is in the picture? A dog runs."] * 4, trainer)
    config = ModelConfig(
        decoder=DecoderConfig(
            vocab_size=320,
            width=64,
            depth=2,
            heads=4,
            kv_heads=2,
            head_width=16,
            mlp_width=96,
            context=256,
            tied_head=True,
        ),
        vision=VisionConfig(image_size=64, variant="lite0"),
        connector=ConnectorConfig(kind="mlp2x_gelu"),
        template="chatml",
        stop_token_ids=(2,),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Llava(config)
        for parameter in model.decoder.parameters():
            if parameter.dim() == 2:  # weights so large that it says something else at every step
                torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(folder, config, model.state_dict(), tokenizer=tokenizer.to_str())
    return folder
