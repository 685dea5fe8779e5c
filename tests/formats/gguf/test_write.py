"""Files for llama.cpp: what they say, that the language model is read back, and llama.cpp's own answers."""

from __future__ import annotations

import ctypes
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from pumice.cli import app
from pumice.config import ConnectorConfig, VisionConfig
from pumice.errors import InputError, WorkError
from pumice.formats.export import export
from pumice.formats.gguf.file import GgufFile, kind_name
from pumice.formats.gguf.library import llama_library
from pumice.formats.gguf.llm import open_gguf
from pumice.formats.gguf.vocab import write_vocabulary
from pumice.formats.gguf.write import TYPES, refusal
from pumice.formats.pumice.folder import save
from pumice.formats.read import read_model
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import as_lazy
from pumice.templates import OWN, Template, get_template

NAMES = ["LLaVA 1.5", "Mistral, pad", "Llama 3", "SigLIP + Qwen2", "Qwen3", "SigLIP + SmolLM2"]


def _tiny(models: ModuleType, part: str) -> LoadedParts:
    [name] = [name for name in models.ARCHITECTURES if part in name]
    return models.tiny(models.ARCHITECTURES[name])


@pytest.mark.parametrize(
    ("name", "value"), [("text_first", "\n"), ("image_line", False), ("shared_line", True)]
)
def test_other_places_of_pictures_are_refused(name: str, value: object, models: ModuleType) -> None:
    """llama.cpp gives a chat template pictures as words of the text; the one written has a line for each."""
    config = _tiny(models, "SigLIP + Qwen2").config
    template = get_template(config.template)
    assert isinstance(template, Template)
    changed = replace(config, template=OWN, chat=replace(template.chat, **{name: value}))
    assert f"the GGUF writer does not implement chat.{name} = {value!r}" in str(refusal(changed))
    assert refusal(replace(config, template=OWN, chat=template.chat)) is None


def test_types_may_be_in_capitals(models: ModuleType, tmp_path: Path) -> None:
    """As the names of files on the hub have them."""
    model = _tiny(models, "SigLIP + Qwen2")
    save(tmp_path / "m", model.config, model.state, tokenizer=model.tokenizer.to_str())
    arguments = ["export", str(tmp_path / "m"), str(tmp_path / "out"), "--to", "gguf"]
    result = CliRunner().invoke(app, [*arguments, "--type", "Q8_0", "--mmproj-type", "F32"])
    assert result.exit_code == 0, result.output
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model-q8_0.gguf", "mmproj-f32.gguf"} <= files


@pytest.mark.parametrize("part", NAMES)
def test_the_language_model_is_read_back(models: ModuleType, tmp_path: Path, part: str) -> None:
    model = _tiny(models, part)
    export(model, "gguf", tmp_path / "out", kind="f32")
    back = open_gguf(tmp_path / "out" / "model-f32.gguf")
    decoder = model.config.decoder
    context = min(decoder.context, decoder.sliding_window or decoder.context)
    assert back.config == replace(decoder, context=context, sliding_window=None)
    for name, tensor in back.state.items():
        assert torch.equal(tensor.read(), model.state[f"decoder.{name}"].read()), name
    assert back.text.files.bos_id == model.config.bos_token_id
    assert back.text.files.eos == model.tokenizer.id_to_token(model.config.stop_token_ids[0])


@pytest.mark.parametrize(
    ("kind", "matrix", "seeing", "worst"),
    [
        ("f16", 1, 1, 5e-4),
        ("bf16", 30, 1, 4e-3),
        ("q8_0", 8, 1, 6e-3),
        ("q4_0", 2, 1, 0.2),
        ("f32", 0, 0, 0.0),
    ],
)
def test_types(models: ModuleType, tmp_path: Path, kind: str, matrix: int, seeing: int, worst: float) -> None:
    """Only the language model is ever quantised; vectors and positions never are."""
    model = _tiny(models, "LLaVA 1.5")
    export(model, "gguf", tmp_path / "out", kind=kind)
    [llm] = (tmp_path / "out").glob("model-*")
    [tower] = (tmp_path / "out").glob("mmproj-*")
    file, eyes = GgufFile(llm), GgufFile(tower)
    assert file.infos["blk.0.attn_q.weight"].kind == matrix
    assert file.infos["token_embd.weight"].kind == (8 if kind == "q4_0" else matrix)
    assert eyes.infos["v.blk.0.attn_q.weight"].kind == eyes.infos["mm.0.weight"].kind == seeing
    for plain in ("blk.0.attn_norm.weight", "output_norm.weight"):
        assert file.infos[plain].kind == 0
    for plain in ("v.position_embd.weight", "v.class_embd", "mm.0.bias", "v.blk.0.ln1.weight"):
        assert eyes.infos[plain].kind == 0
    exact = model.state["decoder.blocks.0.mlp.up.weight"].read()
    assert (file.tensor("blk.0.ffn_up.weight") - exact).abs().max() <= worst  # of weights up to 1.2


def test_the_tower_is_described_as_llama_cpp_reads_it(models: ModuleType, tmp_path: Path) -> None:
    model = _tiny(models, "SigLIP + SmolLM2")
    notes = export(model, "gguf", tmp_path / "out").notes
    file = GgufFile(tmp_path / "out" / "mmproj-f16.gguf")
    clip_metadata = {key: file.metadata[key] for key in file.metadata if key.startswith("clip.")}
    floats = {
        key: clip_metadata.pop(key) for key in list(clip_metadata) if isinstance(clip_metadata[key], float)
    }
    assert floats["clip.vision.attention.layer_norm_epsilon"] == pytest.approx(1e-6)
    assert clip_metadata == {
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": True,
        "clip.vision.image_size": 56,
        "clip.vision.patch_size": 14,
        "clip.vision.embedding_length": 32,
        "clip.vision.feed_forward_length": 64,
        "clip.vision.block_count": 3,
        "clip.vision.attention.head_count": 2,
        "clip.vision.projection_dim": 64,
        "clip.vision.feature_layer": [3],
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.5, 0.5, 0.5],
    }
    assert "v.post_ln.weight" not in file.infos, "llama.cpp would apply it"
    assert any("(122, 116, 104)" in note for note in notes)


def test_the_half_that_sees_in_8_bits(models: ModuleType, tmp_path: Path) -> None:
    model = _tiny(models, "SigLIP + Qwen2")
    export(model, "gguf", tmp_path / "out", tower_kind="q8_0")
    file = GgufFile(tmp_path / "out" / "mmproj-q8_0.gguf")
    kinds = {name: info.kind for name, info in file.infos.items()}
    assert kinds["v.blk.0.ffn_up.weight"] == kinds["mm.2.weight"] == 8
    assert (kinds["v.patch_embd.weight"], kinds["v.position_embd.weight"]) == (1, 0)
    back = read_model(tmp_path / "out").state["tower.blocks.0.mlp.up.weight"].read()
    assert 0 < (back - model.state["tower.blocks.0.mlp.up.weight"].read()).abs().max() < 2e-3


def test_a_shifted_class_token(models: ModuleType, formats: ModuleType, tmp_path: Path) -> None:
    """Every patch has its own position in a llama.cpp that puts the class token last; the first is lost.

    The file says so, is named so, and is read back as the model.
    """
    model = _tiny(models, "LLaVA 1.5")
    notes = " ".join(export(model, "gguf", tmp_path / "out", kind="f32", class_token="shifted").notes)
    assert "one that is mended reads this mmproj wrongly" in notes
    path = tmp_path / "out" / "mmproj-f32-class-token-shifted.gguf"
    assert json.loads(GgufFile(path).metadata["pumice.vision"])["class_token"] == "shifted"
    back = read_model(tmp_path / "out")
    positions = model.state["tower.positions"].read()
    assert torch.equal(back.state["tower.positions"].read(), positions)
    stored = GgufFile(path).tensor("v.position_embd.weight")
    assert torch.equal(stored[:-1], positions[1:]) and torch.equal(stored[-1], positions[0])
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    right, other = models.assistant(model).model, models.assistant(model).model
    other.tower.positions.data = stored
    with torch.inference_mode():
        features = right.tower(pixels)
        with formats.class_token_last():
            moved = other.tower(pixels)
    assert (moved[:, :-1] - features[:, 1:]).abs().max() < 1e-5
    with pytest.raises(InputError, match="class_token shifted is for a CLIP; a tower of kind 'siglip'"):
        export(_tiny(models, "SigLIP + Qwen2"), "gguf", tmp_path / "x", class_token="shifted")
    with pytest.raises(
        InputError, match="there is no 'q3' among the options of GGUF; use one of f32, f16, q8_0"
    ):
        export(model, "gguf", tmp_path / "x", tower_kind="q3")


HAS_LLAMA = importlib.util.find_spec("llama_cpp") is not None


@pytest.mark.skipif(not HAS_LLAMA, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize(
    ("kind", "names", "worst"),
    [("q4_k_m", {"Q4_K", "Q6_K"}, 0.1), ("q5_k_m", {"Q5_K", "Q6_K"}, 0.06), ("q6_k", {"Q6_K"}, 0.03)],
)
def test_k_quants(models: ModuleType, tmp_path: Path, kind: str, names: set[str], worst: float) -> None:
    """llama.cpp's own quantiser writes them; weights read back are near the model's, and llama.cpp's own."""
    [name] = [name for name in models.ARCHITECTURES if "SigLIP + Qwen2" in name]
    architecture = models.ARCHITECTURES[name]
    wide = replace(architecture.config.decoder, width=256, heads=16, mlp_width=512)
    config = replace(architecture.config, decoder=wide)
    model = models.tiny(models.Architecture(config, architecture.tokenizer))
    notes = export(model, "gguf", tmp_path / "out", kind=kind).notes
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "mmproj-f16.gguf",
        f"model-{kind}.gguf",
    ]
    file = GgufFile(tmp_path / "out" / f"model-{kind}.gguf")
    assert {kind_name(info.kind) for info in file.infos.values() if len(info.shape) > 1} == names
    assert any(note.startswith("llama.cpp chose ") for note in notes)
    back = read_model(tmp_path / "out").state
    for matrix in ("decoder.blocks.0.mlp.up.weight", "decoder.head.weight"):
        exact = model.state[matrix].read()
        error = (back[matrix].read() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert 0 < error < worst  # measured: 0.072, 0.037, 0.018
    # llama.cpp restores the same floats.
    library = llama_library("a test")
    params = library.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = TYPES["f32"], 1, True
    restored = tmp_path / "restored.gguf"
    paths = (str(path).encode() for path in (file.path, restored))
    assert library.llama_model_quantize(*paths, ctypes.byref(params)) == 0
    for name, info in GgufFile(restored).infos.items():
        assert info.kind == 0
        assert torch.equal(file.tensor(name), GgufFile(restored).tensor(name)), name


@pytest.mark.skipif(HAS_LLAMA, reason="llama-cpp-python is installed")
def test_k_quants_without_the_library(models: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the GGUF type q4_k_m needs llama-cpp-python: pip install"):
        export(_tiny(models, "SigLIP + Qwen2"), "gguf", tmp_path / "out", kind="q4_k_m")
    assert list(tmp_path.iterdir()) == []


M = "<__media_a1B2__>"  # llama.cpp's marker, in the place of a picture


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("What?", "What?"),
        (f"{M}What?", f"{M}\nWhat?"),
        (f"{M}\nWhat?", f"{M}\nWhat?"),
        (f"{M}{M}What?", f"{M}\n{M}\nWhat?"),
        (f"{M}{M}", f"{M}\n{M}"),
        (f"Is {M}it\n__>{M}", f"Is {M}it\n__>{M}"),
        (f"{M}Is {M}it?", f"{M}\nIs {M}it?"),
    ],
)
@pytest.mark.parametrize("parts", [False, True])
def test_a_picture_in_the_chat_template_is_llama_cpps_marker(
    content: str, expected: str, parts: bool
) -> None:
    """llama.cpp hands over one text, in which a picture's marker has no new line behind it."""
    import jinja2

    from pumice.formats.gguf.write import marked
    from pumice.formats.text.chat_template_write import to_jinja
    from pumice.templates import get_template

    message_content = [{"type": "text", "text": content}] if parts else content
    for wrap in (None, ("<a>", "<b>")):
        written = jinja2.Environment().from_string(marked(to_jinja(get_template("v1")), wrap))
        shown = written.render(
            messages=[{"role": "user", "content": message_content}], add_generation_prompt=True
        )
        wrapped = expected if wrap is None else expected.replace(M, M.join(wrap))
        assert shown.endswith(f"USER: {wrapped} ASSISTANT:")


def test_llama_3_divides_its_slow_frequencies(models: ModuleType, tmp_path: Path) -> None:
    model = _tiny(models, "Llama 3")
    export(model, "gguf", tmp_path / "out")
    divisors = GgufFile(tmp_path / "out" / "model-f16.gguf").tensor("rope_freqs.weight")
    assert divisors.shape == (8,)
    assert divisors[0] == 1.0
    assert divisors[-1] == pytest.approx(8.0)
    assert (divisors.diff() >= 0).all()


@pytest.mark.parametrize(
    ("value", "kind", "error", "message"),
    [
        (1e5, "f16", InputError, "has values beyond the 65504 of F16; use --type f32"),
        (torch.nan, "f16", WorkError, "holds nan or inf; get the model again"),
        (torch.inf, "q8_0", WorkError, "holds nan or inf; get the model again"),
    ],
)
def test_a_value_that_cannot_be_written(
    models: ModuleType, tmp_path: Path, value: float, kind: str, error: type[Exception], message: str
) -> None:
    model = _tiny(models, "LLaVA 1.5")
    name = "decoder.blocks.0.mlp.up.weight"
    weight = model.state[name].read().clone()
    weight[0, 0] = value
    model = replace(model, state=model.state | {name: as_lazy(weight)})
    with pytest.raises(error, match=f"blk.0.ffn_up.weight {message}"):
        export(model, "gguf", tmp_path / "out", kind=kind)
    assert list(tmp_path.iterdir()) == []


class _Writer:
    """What `write_vocabulary` says."""

    def __init__(self) -> None:
        self.fields: dict[str, object] = {}

    def _keep(self, key: str, value: object) -> None:
        self.fields[key.removeprefix("tokenizer.ggml.")] = value

    add_string = add_array = add_bool = add_uint32 = _keep


def test_a_sentencepiece_vocabulary(models: ModuleType) -> None:
    model = _tiny(models, "LLaVA 1.5")
    config = replace(model.config, decoder=replace(model.config.decoder, vocab_size=400))
    writer = _Writer()
    write_vocabulary(writer, config, model.tokenizer)
    metadata = writer.fields
    size = model.tokenizer.get_vocab_size()
    tokens, kinds, scores = metadata["tokens"], metadata["token_type"], metadata["scores"]
    assert metadata["model"] == "llama"
    assert len(tokens) == len(kinds) == len(scores) == 400
    assert tokens[size:] == [f"[PAD{i}]" for i in range(size, 400)]
    assert kinds[:4] == [2, 3, 3, 6], "unknown, control, control, byte"
    assert kinds[size:] == [5] * (400 - size)
    merged = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 1 and len(token) > 1]
    in_order = sorted(merged, key=lambda token: -scores[tokens.index(token)])
    assert in_order == merged, "the first merged has the highest score"
    assert metadata["add_bos_token"] is True
    assert metadata["add_space_prefix"] is True
    assert (metadata["bos_token_id"], metadata["eos_token_id"], metadata["unknown_token_id"]) == (1, 2, 0)


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_byte_level_vocabulary_names_how_words_are_split(models: ModuleType, split: str) -> None:
    model = _tiny(models, "SigLIP + Qwen2")
    tokenizer = models.byte_level(split, models.CHATML)
    writer = _Writer()
    config = replace(model.config, decoder=replace(model.config.decoder, vocab_size=320))
    write_vocabulary(writer, config, tokenizer)
    assert (writer.fields["model"], writer.fields["pre"]) == ("gpt2", split)
    assert writer.fields["token_type"][:4] == [3, 3, 3, 1]
    assert writer.fields["add_bos_token"] is False
    assert all(merge.count(" ") == 1 for merge in writer.fields["merges"])


@pytest.mark.parametrize("kind", ["words", "merges"])
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(models: ModuleType, kind: str) -> None:
    import tokenizers

    model = _tiny(models, "LLaVA 1.5")
    if kind == "words":
        tokenizer = models.byte_level("gpt-2", models.CHATML)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        message = "no name for how the tokenizer splits words"
    else:
        values = json.loads(model.tokenizer.to_str())
        del values["model"]["merges"][0]
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(values))
        message = "never merges"
    with pytest.raises(InputError, match=message):
        write_vocabulary(_Writer(), model.config, tokenizer)


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize("part", NAMES)
@pytest.mark.parametrize("seeing", [True, False])
def test_llama_cpp_answers_the_same(
    models: ModuleType, formats: ModuleType, tmp_path: Path, part: str, seeing: bool
) -> None:
    """With its class token last (its issue 25814), where the model has one and llama.cpp still does so."""
    model = _tiny(models, part)
    export(model, "gguf", tmp_path / "out", kind="f32")
    cell = formats.run_llama_cpp(model, models.picture(56, 56) if seeing else None, tmp_path / "out")
    assert cell.greedy
    # Of log-probabilities. Measured: 6.7e-5 of text; 3.9e-2 of a picture, for which llama.cpp takes GELU
    # in its tanh form, and GELU and quick GELU from tables of 16-bit numbers.
    assert cell.difference < (0.15 if seeing else 3e-4)


def test_what_llama_cpp_does_otherwise_is_told(models: ModuleType, tmp_path: Path) -> None:
    model = _tiny(models, "Mistral, pad")
    notes = " ".join(export(model, "gguf", tmp_path / "out").notes)
    assert "25814" in notes
    assert "512 tokens" in notes, "of the sliding window"
    bare = replace(model, tokenizer=models.sentencepiece(legacy=False))
    notes = " ".join(export(bare, "gguf", tmp_path / "bare").notes)
    assert "puts a space" in notes
    [seeing] = [name for name in models.ARCHITECTURES if "SigLIP + Qwen2" in name]
    notes = " ".join(export(models.tiny(models.ARCHITECTURES[seeing]), "gguf", tmp_path / "siglip").notes)
    assert "25814" not in notes
    assert "squash" in notes


def test_a_language_model_alone(models: ModuleType, tmp_path: Path) -> None:
    model = _tiny(models, "SigLIP + SmolLM2")
    config = replace(
        model.config,
        vision=VisionConfig(kind="none", width=model.config.decoder.width),
        connector=ConnectorConfig("identity"),
    )
    state = {name: tensor for name, tensor in model.state.items() if name.startswith("decoder.")}
    export(replace(model, config=config, state=state), "gguf", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model-f16.gguf"]
