"""Checkpoints of nanoVLM: random ones, read, asked and compared with its own modules."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import save_file

from pumice import load
from pumice.config import IMAGE_TOKEN, ConnectorConfig, ModelConfig
from pumice.conversation import Conversation, user_message
from pumice.errors import InputError
from pumice.formats import nanovlm
from pumice.formats.derived import Derived
from pumice.model.layers import rope_inv_freq
from pumice.model.llava import Llava
from pumice.storage.json_file import Keys
from pumice.storage.tensors import as_lazy
from pumice.train import run

# A copy of huggingface/nanoVLM: git clone https://github.com/huggingface/nanoVLM build/nanoVLM
OWN_CODE = Path(__file__).parents[2] / "build/nanoVLM"
SIDE, MAX = 32, 96
EXTRA = {"image_token": "<|image|>", "global_image_token": "<|global_image|>"}
EXTRA |= {f"r{row}c{col}": f"<row_{row}_col_{col}>" for row in range(1, 9) for col in range(1, 9)}
CHAT = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES: dict[str, Any] = {
    "vit_hidden_dim": 32, "vit_inter_dim": 48, "vit_patch_size": 8, "vit_img_size": SIDE, "vit_n_heads": 2,
    "vit_dropout": 0.0, "vit_n_blocks": 2, "vit_ln_eps": 1e-6, "vit_cls_flag": False, "lm_hidden_dim": 48,
    "lm_inter_dim": 64, "lm_rms_eps": 1e-5, "lm_re_base": 100000, "lm_max_position_embeddings": 1024,
    "lm_n_heads": 4, "lm_n_kv_heads": 2, "lm_dropout": 0.0, "lm_n_blocks": 2, "lm_attn_scaling": 1.0,
    "lm_use_tokens": False, "lm_tie_weights": True, "lm_tokenizer": "owner/never-asked",
    "lm_chat_template": CHAT, "mp_pixel_shuffle_factor": 2, "mp_image_token_length": 4, "max_img_size": MAX,
    "resize_to_max_side_len": False, "vlm_extra_tokens": EXTRA,
}  # fmt: skip


def write_folder(folder: Path, models: ModuleType, **changes: Any) -> dict[str, Any]:
    """A checkpoint without tensors, with a tokenizer of its own; return its config."""
    tokenizer = models.byte_level("smollm", models.CHATML)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    values = SIZES | {"lm_vocab_size": tokenizer.get_vocab_size() + len(EXTRA)} | changes
    (folder / "config.json").write_text(json.dumps(values))
    return values


@pytest.fixture
def own_code() -> Iterator[None]:
    """Let `models.…` be nanoVLM's package; importing it needs torch alone."""
    if not OWN_CODE.is_dir():
        pytest.skip("build/nanoVLM, a clone of huggingface/nanoVLM, is not here")
    sys.path.insert(0, str(OWN_CODE))
    yield
    sys.path.remove(str(OWN_CODE))
    for name in [name for name in sys.modules if name == "models" or name.startswith("models.")]:
        del sys.modules[name]


class Reference(torch.nn.Module):
    """nanoVLM's VisionLanguageModel without its tokenizer, which it takes from the hub."""

    def __init__(self, values: dict[str, Any]) -> None:
        from models.config import VLMConfig
        from models.language_model import LanguageModel
        from models.modality_projector import ModalityProjector
        from models.vision_transformer import ViT

        super().__init__()
        config = VLMConfig(**values)
        self.vision_encoder, self.decoder, self.MP = (
            ViT(config),
            LanguageModel(config),
            ModalityProjector(config),
        )

    def forward(self, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        embedded = self.decoder.token_embedding(ids.clamp(min=0))
        embedded[ids == IMAGE_TOKEN] = self.MP(self.vision_encoder(pixels)).flatten(0, 1)
        hidden, _ = self.decoder(embedded[None])
        return self.decoder.head(hidden)[0]


def test_stored_frequencies_must_be_those_of_the_config() -> None:
    keys = Keys(SIZES | {"lm_vocab_size": 300}, "config.json")
    decoder, vision = nanovlm._decoder(keys), nanovlm._vision(keys)
    derived = nanovlm._table(decoder, vision)["decoder.rotary_embd.inv_freq"]
    assert isinstance(derived, Derived)
    cpu = torch.device("cpu")
    derived.check(as_lazy(rope_inv_freq(12, 100000, None, cpu)), "m")
    with pytest.raises(InputError, match="is not what rope_theta 100000 and heads of 12 values give"):
        derived.check(as_lazy(rope_inv_freq(12, 10000, None, cpu)), "m")


@pytest.mark.usefixtures("own_code")
def test_tiles_and_logits_are_those_of_its_own_code(models: ModuleType, tmp_path: Path) -> None:
    """With one picture of several tiles and one of a single one."""
    values = write_folder(tmp_path, models)
    reference = models.perturbed(lambda: Reference(values))
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    save_file({n: t for n, t in state.items() if n != "decoder.head.weight"}, tmp_path / "model.safetensors")
    assistant = load(tmp_path, quantize=None)
    large, small = models.picture(70, 50), models.picture(30, 20)
    prompt = assistant.prompt(Conversation((user_message("What?", [large, small]),)))
    sample = assistant.processor.prompt(Conversation((user_message("What?", [large, small]),)))
    pixels = assistant.processor.pixels(sample.images, sample.layouts)
    # torchvision resizes a tensor as PyTorch does with antialias; 96 x 96 is what DynamicResize gives.
    whole = np.asarray(large.resize((96, 96), 3), np.float32).transpose(2, 0, 1) / 255
    expected = F.interpolate(torch.tensor(whole)[None], (SIDE, SIDE), mode="bilinear", antialias=True)
    np.testing.assert_allclose(pixels[0], expected[0].numpy(), atol=2e-6)
    assert len(pixels) == 1 + 9 + 1
    np.testing.assert_array_equal(pixels[3], whole[:, :SIDE, 2 * SIDE :])
    text = assistant.processor.tokenizer.backend.decode(
        [n for n in sample.input_ids.tolist() if n != IMAGE_TOKEN], skip_special_tokens=False
    )
    tiles = "".join(f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3))
    assert text == (
        f"<|im_start|>user\n<image: 0><|global_image|>{tiles}<image: 1><|global_image|>What?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    with torch.inference_mode():
        logits = assistant.model.decoder.logits(
            assistant.model(prompt.input_ids[None], prompt.encode_images())
        )[0]
        difference = (logits - reference(prompt.input_ids, torch.from_numpy(pixels))).abs().max().item()
    assert difference < 1e-4


def test_a_checkpoint_is_trained_by_a_recipe(models: ModuleType, tmp_path: Path) -> None:
    """Eight rows about pictures of several tiles, until every answer is known."""
    # 1. A random checkpoint under its own names. Its tied head is stored once.
    folder, data = tmp_path / "base", tmp_path / "data"
    folder.mkdir()
    data.mkdir()
    keys = Keys(write_folder(folder, models), "config.json")
    decoder, vision = nanovlm._decoder(keys), nanovlm._vision(keys)
    config = ModelConfig(decoder, vision, ConnectorConfig("linear", "pixel_shuffle", 2, bias=False))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = Llava(config).state_dict()
    table = nanovlm._table(decoder, vision)
    state = {name: ours[own].clone() for name, own in table.items() if isinstance(own, str) and own in ours}
    positions = "vision_encoder.patch_embedding.position_embedding"
    state[positions] = state[positions][None]
    state["decoder.token_embedding.weight"] *= 0.1  # it is the head, too
    state.pop("decoder.head.weight")
    save_file(state, folder / "model.safetensors")
    # 2. Two questions about each of four pictures.
    colours = {"red": (200, 20, 20), "green": (20, 160, 40), "blue": (20, 40, 200), "yellow": (230, 220, 30)}
    rows = []
    for number, (name, colour) in enumerate(colours.items()):
        Image.new("RGB", (60, 40 + 40 * (number % 2)), colour).save(data / f"{name}.png")
        for question, answer in (("Colour?", name), ("Number?", str(number))):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            rows.append({"id": f"{name} {question}", "image": f"{name}.png", "conversations": turns})
    (data / "rows.json").write_text(json.dumps(rows))
    recipe = {
        "name": "run", "output": str(tmp_path / "run"), "model": str(folder),
        "stage": {"learn": {"connector": 3e-3, "decoder": 3e-3}}, "data": [{"rows": str(data / "rows.json")}],
        "pictures": [str(data)], "epochs": 60, "batch": 8, "pack_tokens": 512, "precision": "fp32",
        "device": "cpu",
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    # 3. The trained folder is Pumice's own, with nanoVLM's tiles.
    assistant = load(run(tmp_path / "run.yaml"), quantize=None)
    assert assistant.model.config.image.mode == "grid"
    for row in rows:
        question, answer = (turn["value"].removeprefix("<image>\n") for turn in row["conversations"])
        assert assistant.ask(data / row["image"], question, max_new_tokens=8) == answer


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"mp_image_token_length": 64},
            "mp_image_token_length is 64, but a tile of 32 pixels makes 4 tokens",
        ),
        ({"vlm_extra_tokens": {}}, "names no image_token in vlm_extra_tokens"),
        ({"vlm_extra_tokens": EXTRA | {"r1c2": "<odd>"}}, "the token r1c2 is '<odd>', not '<row_1_col_2>'"),
        ({"max_img_size": 100}, "max_img_size 100 is no multiple of vit_img_size 32"),
        (
            {"mp_pixel_shuffle_factor": 3},
            "config.json: mp_pixel_shuffle_factor: a grid of 4 x 4 .* reduced by 3",
        ),
        ({"vit_cls_flag": True}, "vit_cls_flag is true; only false can be read"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    changes: dict[str, Any], words: str, models: ModuleType, tmp_path: Path
) -> None:
    write_folder(tmp_path, models, **changes)
    with pytest.raises(InputError, match=words):
        load(tmp_path)
