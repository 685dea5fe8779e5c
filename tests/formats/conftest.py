"""Tiny models of others: GGUF as llama.cpp's converter would write it, folders by transformers itself."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import HfFileSystem, constants
from huggingface_hub.utils import _http
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from pumice.config import DecoderConfig
from pumice.formats import names as tensor_names
from pumice.formats.hf.read import open_hf
from pumice.storage import download

if TYPE_CHECKING:
    from pretend_hub import Hub

sys.path.insert(0, str(Path(__file__).parent))  # for `pretend_hub`, which test files import

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"]
TOKENS = [
    *SPECIAL,
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(m.replace(" ", "") for m in MERGES),
    "<think>",
]
CONFIG = DecoderConfig(
    vocab_size=len(TOKENS),
    width=256,
    depth=2,
    heads=4,
    kv_heads=2,
    head_dim=64,
    mlp_width=512,
    tied_head=True,
)


def random_state(config: DecoderConfig, seed: int = 0) -> dict[str, Tensor]:
    """Our names -> random tensors, shapes from the config."""
    rows = {"q": config.heads * config.head_dim, "k": config.kv_heads * config.head_dim}
    rows |= {"v": rows["k"], "o": config.width, "gate": config.mlp_width, "up": config.mlp_width}
    rows |= {"down": config.width, "embed": config.vocab_size, "head": config.vocab_size}
    columns = {"o": rows["q"], "down": config.mlp_width}
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name in tensor_names.inverse(tensor_names.gguf_decoder(config)):
        layer = name.split(".")[-2]
        if layer in rows and name.endswith(".weight"):
            shape: tuple[int, ...] = (rows[layer], columns.get(layer, config.width))
        elif layer in ("q_norm", "k_norm"):
            shape = (config.head_dim,)
        else:
            shape = (rows.get(layer, config.width),)
        state[name] = torch.randn(shape, generator=generator)
    return state


def permute(weight: Tensor, heads: int) -> Tensor:
    """As in llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


WriteGguf = Callable[..., dict[str, Tensor]]


@pytest.fixture
def write_gguf() -> WriteGguf:
    def write(
        path: Path,
        config: DecoderConfig = CONFIG,
        kind: str = "llama",
        quantised: str = "F32",
        pre: str = "smollm",
        extra: dict[str, Tensor] | None = None,
        **metadata: int | float | str,
    ) -> dict[str, Tensor]:
        """Write the file; returns the exact tensors that it stands for, under our names."""
        writer = gguf.GGUFWriter(path, kind)
        writer.add_context_length(config.context)
        writer.add_embedding_length(config.width)
        writer.add_block_count(config.depth)
        writer.add_feed_forward_length(config.mlp_width)
        writer.add_head_count(config.heads)
        writer.add_head_count_kv(config.kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL) - 1) + [4])
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(True)
        writer.add_chat_template("{{ messages }}")
        for key, value in metadata.items():
            name = key.replace("__", ".")
            if isinstance(value, str):
                writer.add_string(name, value)
            elif isinstance(value, float):
                writer.add_float32(name, value)
            else:
                writer.add_uint32(name, int(value))
        gguf_names = tensor_names.inverse(tensor_names.gguf_decoder(config))
        exact = {}
        for name, tensor in (extra or {}).items():
            writer.add_tensor(name, tensor.numpy())
        for name, tensor in random_state(config).items():
            heads = {"q": config.heads, "k": config.kv_heads}.get(name.split(".")[-2])
            permuted = kind == "llama" and heads is not None
            stored = (permute(tensor, heads) if permuted and heads else tensor).numpy().astype(np.float32)
            quant = gguf.GGMLQuantizationType[quantised if tensor.dim() == 2 else "F32"]
            data = gguf.quants.quantize(stored, quant)
            writer.add_tensor(str(gguf_names[name]), data, raw_dtype=quant)
            # Rows are whole blocks, so quantising commutes with the permutation.
            exact[name] = torch.from_numpy(
                gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), quant), quant).copy()
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return exact

    return write


# Models of others, tiny and random.

WORDS = ["<unk>", "<s>", "</s>", "<image>", "<pad>", "<im_start>", "<im_end>"]
WORDS += ["<|im_start|>", "<|im_end|>"]
ROWS = 288  # of their embeddings: more than the tokenizer's 271 tokens, as real ones have
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXT: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
PIXELS: dict[str, Any] = {
    "do_resize": True, "size": {"shortest_edge": 16}, "do_center_crop": True,
    "crop_size": {"height": 16, "width": 16}, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
SQUASHED = PIXELS | {"size": {"height": 16, "width": 16}, "do_center_crop": False}


def write_tokenizer(folder: Path, chat: str | None = CHAT) -> None:
    """A byte-level tokenizer with everybody's special tokens, which puts <s> first, as Llama's does."""
    words = [*WORDS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)]
    tokenizer = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [(a, b) for a, b in (m.split() for m in MERGES)])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(WORDS)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    own = {} if chat is None else {"chat_template": chat}
    write(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", **own})


def write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values))


def randomise(model: Any, seed: int = 0) -> None:
    """Every parameter random and large enough that each one matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * 0.3 if parameter.dim() >= 2 else 1 + 0.5 * noise


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder as transformers writes it, by kind: llava, siglip, next, next_video, onevision.

    Not to be changed.
    """
    folders: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("hf") / "model"
            _write_llava(folders[kind], kind)
        return folders[kind]

    return make


def _write_llava(folder: Path, kind: str) -> None:
    import transformers

    clip = transformers.CLIPVisionConfig(**VISION, projection_dim=24)
    siglip = transformers.SiglipVisionConfig(**VISION, vision_use_head=False)
    name, text, vision, more = {
        "llava": ("Llava", transformers.LlamaConfig(**TEXT), clip, {}),
        "siglip": (
            "Llava", transformers.Qwen3Config(**TEXT, tie_word_embeddings=True), siglip,
            {"vision_feature_select_strategy": "full"},
        ),
        "next": (
            "LlavaNext", transformers.MistralConfig(**TEXT, sliding_window=300), clip,
            {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]},
        ),
        "next_video": (
            "LlavaNextVideo", transformers.LlamaConfig(**TEXT), clip,
            {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]], "video_token_index": 4},
        ),
        "onevision": (
            "LlavaOnevision", transformers.Qwen2Config(**TEXT), siglip,
            {"image_grid_pinpoints": [[16, 32], [32, 16], [48, 48]], "vision_aspect_ratio": "anyres_max_4",
             "video_token_index": 4},
        ),
    }[kind]  # fmt: skip
    config_class = getattr(transformers, f"{name}Config")
    config = config_class(vision_config=vision, text_config=text, image_token_index=3, **more)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    randomise(model)
    model.tie_weights()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    pixels = SQUASHED if kind in ("siglip", "onevision") else PIXELS
    tiles = {"image_grid_pinpoints": more["image_grid_pinpoints"]} if "image_grid_pinpoints" in more else {}
    write(folder / "preprocessor_config.json", pixels | tiles | {"do_pad": bool(tiles)})


@pytest.fixture(scope="session")
def parts_of(tmp_path_factory: pytest.TempPathFactory, llava: Callable[[str], Path]) -> tuple[Path, Path]:
    """The `llava` above taken apart: folders of a CLIP vision tower and of a bare Llama."""
    import transformers

    hf_model = transformers.LlavaForConditionalGeneration.from_pretrained(llava("llava"), dtype=torch.float32)
    tower, llm = (tmp_path_factory.mktemp("parts") / name for name in ("tower", "llm"))
    hf_model.model.vision_tower.save_pretrained(tower)
    write(tower / "preprocessor_config.json", PIXELS)
    language = transformers.LlamaForCausalLM(hf_model.config.text_config)
    language.model, language.lm_head = hf_model.model.language_model, hf_model.lm_head
    language.save_pretrained(llm)
    write_tokenizer(llm)
    return tower, llm


@pytest.fixture(scope="session")
def change() -> Callable[..., None]:
    """Sets keys of a JSON file; `a__b` is the key b of the object a, and None removes a key."""

    def set_keys(path: Path, **values: Any) -> None:
        whole = json.loads(path.read_text()) if path.is_file() else {}
        for key, value in values.items():
            *above, last = key.split("__")
            place = whole
            for name in above:
                place = place[name]
            place[last] = value
            if value is None:
                del place[last]
        write(path, whole)

    return set_keys


@pytest.fixture
def hf(llava: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a LLaVA of transformers, with the head and names of an older version."""

    def make(kind: str) -> Path:
        folder = Path(shutil.copytree(llava(kind), tmp_path / kind))
        loaded = open_hf(folder)
        table = tensor_names.llava(
            loaded.config, tensor_names.HF_NESTINGS[0], tensor_names.hf_connector(True), "vision_model."
        )
        names = tensor_names.inverse(table)
        state = {names[ours]: tensor.read() for ours, tensor in loaded.state.items()}
        save_file(state, folder / "model.safetensors")
        return folder

    return make


@pytest.fixture
def original(
    llava: Callable[[str], Path], parts_of: tuple[Path, Path], tmp_path: Path, change: Callable[..., None]
) -> Callable[..., Path]:
    """A folder of the original code: a Llama's or, as `kind` onevision, a Qwen2's."""

    def make(kind: str = "llava", **values: Any) -> Path:
        loaded = open_hf(llava(kind))
        projector = tensor_names.ORIGINAL_CONNECTORS["mlp2x_gelu"]
        table = tensor_names.llava(loaded.config, tensor_names.ORIGINAL, projector, "vision_model.")
        names = tensor_names.inverse(table)
        folder = tmp_path / "original"
        folder.mkdir()
        state = {names[ours]: tensor.read() for ours, tensor in loaded.state.items()}
        torch.save(state, folder / "pytorch_model.bin")
        own = json.loads((llava(kind) / "config.json").read_text())
        tower = folder / "eye"
        tower.mkdir()
        change(tower / "config.json", **own["vision_config"])
        text = own["text_config"] | {"architectures": None}
        change(folder / "config.json", **text | {
            "model_type": "llava", "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "eye",
            "mm_vision_select_layer": -2, "image_aspect_ratio": "pad",
        } | values)  # fmt: skip
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(parts_of[1] / file, folder)
        return folder

    return make


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub and an empty cache."""
    from pretend_hub import BLOCK, Hub

    hub = Hub(tmp_path / "hub")
    address = f"http://127.0.0.1:{hub.server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "BLOCK_BYTES", BLOCK)
    HfFileSystem.clear_instance_cache()
    _http.close_session()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    HfFileSystem.clear_instance_cache()
    _http.close_session()
