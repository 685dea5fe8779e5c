"""PEFT's adapters on a LLaVA: the same logits as PEFT's, whatever they adapt; the rest refused by key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pumice.errors import InputError
from pumice.formats.hf.read import open_hf
from pumice.formats.load import open_model
from pumice.formats.peft.read import adapt
from pumice.formats.peft.write import BASE, fingerprint
from pumice.formats.read import read_model

Llavas = Callable[[str], Path]
IDS = torch.tensor([[1, 20, 30, 40, 50, 60]])
TEXT = r".*language_model.*\.(q_proj|v_proj|down_proj)"
# name -> (PEFT's options, the targets that stay adapters)
ADAPTERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "blocks of the LLM": ({"target_modules": TEXT}, ("q", "v", "down")),
    "root of the rank": ({"target_modules": TEXT, "use_rslora": True}, ("q", "v", "down")),
    "tower as well": ({"target_modules": ["q_proj", "k_proj"]}, ("q", "k")),
    "head": ({"target_modules": ["lm_head", "gate_proj"]}, ("gate",)),
    "one block": ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}, ()),
}


@pytest.fixture
def adapter(llava: Llavas, tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """PEFT's model and the folder that it saves."""

    def make(**options: Any) -> tuple[Any, Path]:
        import peft
        import transformers

        base = transformers.LlavaForConditionalGeneration.from_pretrained(llava("llava"), dtype=torch.float32)
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=3, lora_dropout=0.1, **options))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        model.save_pretrained(tmp_path / "adapter")
        return model.eval(), tmp_path / "adapter"

    return make


@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_logits_equal_those_of_peft(adapter: Callable[..., Any], llava: Llavas, name: str) -> None:
    options, targets = ADAPTERS[name]
    peft_logits, folder = adapter(**options)
    loaded = read_model(folder, base=str(llava("llava")))
    assert (loaded.config.lora.targets if loaded.config.lora else ()) == targets
    model = open_model(folder, base=str(llava("llava"))).model
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prompt_ids = torch.tensor([[1, *[3] * 16, 20, 30]])
    for ids, shown in ((IDS, None), (prompt_ids, pixels)):
        expected = peft_logits(input_ids=ids, pixel_values=shown).logits
        our_ids = ids.masked_fill(ids == 3, -200)
        actual = model.decoder.logits(model(our_ids, None if shown is None else model.encode(shown)))
        difference = (actual - expected).abs().max().item()
        print(f"{name}: {difference:.1e} of {expected.abs().max():.1f}")
        assert difference < 1e-4  # measured worst: 6.5e-6


def test_the_base_that_the_adapter_names_is_opened(adapter: Callable[..., Any], llava: Llavas) -> None:
    _, folder = adapter(target_modules=TEXT)
    loaded = read_model(folder)
    assert loaded.sources["base"] == (str(llava("llava")), llava("llava"))
    assert loaded.sources["model"] == (str(folder), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match=r"adapter_config\.json names no base; give it with --base"):
        read_model(folder)


def test_another_base_is_refused_by_its_fingerprint(adapter: Callable[..., Any], llava: Llavas) -> None:
    _, folder = adapter(target_modules=TEXT)
    base = open_hf(llava("llava"))
    (folder / BASE).write_text(json.dumps({"fingerprint": fingerprint(base.state)}))
    adapt(base, folder)
    with pytest.raises(
        InputError, match=r"base\.json: .* with the fingerprint [0-9a-f]{32}, this has [0-9a-f]"
    ):
        adapt(open_hf(llava("next")), folder)


def test_adapters_do_not_stand_on_adapters(adapter: Callable[..., Any]) -> None:
    _, folder = adapter(target_modules=TEXT)
    with pytest.raises(InputError, match="has LoRA adapters of its own"):
        read_model(folder, base=str(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, 'peft_type is "IA3"; only "LORA"'),
        ({"use_dora": True}, "use_dora is true; only false"),
        ({"lora_bias": True}, "lora_bias is true; only false"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens is \[1, 2\], which cannot be read"),
        ({"bias": "all"}, 'bias is "all"; only "none"'),
        ({"rank_pattern": {"q_proj": 4}}, r"rank_pattern is \{'q_proj': 4\}, which cannot be read"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern is"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' changes the base"),
        ({"r": 4}, r"r is 4, but .*lora_A\.weight has the shape \[2, "),
        ({"r": 0}, "r is 0; it must be 1 or more"),
        ({"lora_alpha": "3"}, "lora_alpha should be a number, not '3'"),
    ],
)
def test_what_cannot_be_read(
    adapter: Callable[..., Any], llava: Llavas, values: dict[str, Any], message: str
) -> None:
    _, folder = adapter(target_modules=TEXT)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | values))
    with pytest.raises(InputError, match=message) as caught:
        adapt(open_hf(llava("llava")), folder)
    assert "adapter_config.json" in str(caught.value)


def test_tensors_that_fit_nothing(adapter: Callable[..., Any], llava: Llavas) -> None:
    _, folder = adapter(target_modules=TEXT)
    good = load_file(folder / "adapter_model.safetensors")
    first = next(name for name in good if "lora_B" in name)
    for change, message in (
        ({first: None}, "has only one of lora_A and lora_B"),
        (
            {first.replace("layers.0", "layers.7"): good[first].clone()},
            r"layers\.7.* adapts no linear layer of the base",
        ),
        ({"odd": torch.zeros(1)}, r"its tensor odd \(odd in adapter_model\.safetensors\) adapts no"),
        (dict.fromkeys(good), "its weights are empty"),
    ):
        changed = {n: t for n, t in (good | change).items() if t is not None}
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(InputError, match=message):
            adapt(open_hf(llava("llava")), folder)
