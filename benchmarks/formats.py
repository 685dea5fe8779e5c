"""Every format against every architecture: the numbers, the answers and the bytes that come back.

    python benchmarks/formats.py [--json] [--only PART ...]

For each architecture a tiny random model is written in Pumice's own folder, exported to each format, read
back from it, and, where they are installed, run by transformers (hf), PEFT (peft) and llama.cpp (gguf, by
the package xllamacpp). A cell says:

    difference   the largest absolute difference of logits on one picture and question; for llama.cpp of
                 log-probabilities, which is what it gives
    greedy       whether the next tokens are the same
    bytes        whether importing what was exported gives every tensor back, bit for bit
    refused      why the format cannot hold the model
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, trainers
from torch import Tensor

from pumice.assistant import Assistant
from pumice.config import (
    ConnectorConfig,
    DecoderConfig,
    ImagePolicy,
    LoraConfig,
    ModelConfig,
    RopeScaling,
    VisionConfig,
)
from pumice.conversation import Conversation, user_message
from pumice.engine.generate import naive_generate
from pumice.errors import InputError
from pumice.model.llava import Llava
from pumice.model.vision import ViT
from pumice.processor import Processor
from pumice.tokens import Tokenizer as OurTokenizer
from pumice.weights.checkpoint import stored
from pumice.weights.export import FORMATS, export, merged
from pumice.weights.folder import LoadedParts
from pumice.weights.gguf_llm import PRE_TOKENIZERS
from pumice.weights.read import read_model
from pumice.weights.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, SentencePiece

QUESTION = "What is in the picture?"
NEW_TOKENS = 12
TEXT = ["user assistant system human What is in the picture? A dog runs over the green field."] * 4
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


def sentencepiece() -> Tokenizer:
    """As Llama's, with its bytes and its legacy space; 3 control tokens."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    learner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=100, show_progress=False))
    words = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    letters = [word for word, _ in words if len(word) == 1]
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    longer = [word for word, _ in words if len(word) > 1]
    pieces += [(word, -float(rank), NORMAL) for rank, word in enumerate([*longer, *letters])]
    return SentencePiece(pieces, model_type=2, charsmap=b"", remove_spaces=False).tokenizer("a tiny model")


def byte_level(split: str, specials: list[str]) -> Tokenizer:
    """Byte-pair encoding of bytes, which splits words as `split` says (a name of llama.cpp's)."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    learner = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, learner)
    return tokenizer


CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
DECODER = DecoderConfig(
    vocab_size=0, width=64, depth=2, heads=4, kv_heads=2, head_width=16, mlp_width=96, context=1024
)
CLIP = VisionConfig(
    kind="clip", image_size=56, width=32, stride=14, depth=3, heads=2, mlp_width=64, activation="quick_gelu"
)
SIGLIP = replace(CLIP, kind="siglip", activation="gelu_tanh", norm_eps=1e-6, select="full")
PAD = ImagePolicy("pad", CLIP_MEAN, CLIP_STD, pad_color=(122, 116, 104))
TILES = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))


@dataclass(frozen=True)
class Architecture:
    """A model without numbers; the decoder's vocabulary is the tokenizer's."""

    config: ModelConfig
    tokenizer: Callable[[], Tokenizer]


def _vicuna(**changes: Any) -> ModelConfig:
    base = ModelConfig(
        DECODER, CLIP, ConnectorConfig(), PAD, template="v1", stop_token_ids=(2,), bos_token_id=1
    )
    return replace(base, **changes)


def _chatml(decoder: DecoderConfig, **changes: Any) -> ModelConfig:
    base = ModelConfig(decoder, CLIP, ConnectorConfig(), PAD, template="chatml", stop_token_ids=(2,))
    return replace(base, **changes)


ARCHITECTURES = {
    "CLIP + Llama, pad (LLaVA 1.5)": Architecture(_vicuna(), sentencepiece),
    "CLIP + Llama, linear, crop (LLaVA 1.0)": Architecture(
        _vicuna(
            connector=ConnectorConfig("linear"),
            template="v0",
            image=replace(PAD, mode="crop"),
            stop_token_ids=(2,),
        ),
        sentencepiece,
    ),
    "CLIP + Mistral, anyres (LLaVA 1.6)": Architecture(
        _vicuna(
            decoder=replace(DECODER, sliding_window=256),
            image=replace(PAD, mode="anyres", pinpoints=TILES),
            template="mistral_instruct",
        ),
        sentencepiece,
    ),
    "CLIP + Mistral, pad": Architecture(
        _vicuna(decoder=replace(DECODER, sliding_window=512), template="mistral_instruct"), sentencepiece
    ),
    "CLIP + Llama 3, pad": Architecture(
        _chatml(
            replace(DECODER, rope_base=500000.0, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
            bos_token_id=0,
        ),
        lambda: byte_level("llama-bpe", CHATML),
    ),
    "SigLIP + Qwen2, squash": Architecture(
        _chatml(
            replace(DECODER, qkv_bias=True, norm_eps=1e-6, rope_base=1e6),
            vision=SIGLIP,
            image=ImagePolicy("squash", HALF, HALF, pad_color=(127, 127, 127)),
        ),
        lambda: byte_level("qwen2", CHATML),
    ),
    "CLIP + Qwen3, crop": Architecture(
        _chatml(
            replace(DECODER, qk_norm=True, norm_eps=1e-6, tied_head=True, head_width=32),
            image=replace(PAD, mode="crop"),
        ),
        lambda: byte_level("qwen2", CHATML),
    ),
    "SigLIP + SmolLM2, pad": Architecture(
        _chatml(
            replace(DECODER, tied_head=True),
            vision=replace(SIGLIP, layer=-1),
            image=ImagePolicy("pad", HALF, HALF, pad_color=(127, 127, 127)),
        ),
        lambda: byte_level("smollm", CHATML),
    ),
    "CLIP + Llama, LoRA": Architecture(
        _vicuna(lora=LoraConfig(rank=4, alpha=8.0, targets=("q", "v", "down"))), sentencepiece
    ),
    "EfficientNet + SmolLM2 (pumice-tiny)": Architecture(
        _chatml(
            replace(DECODER, tied_head=True),
            vision=VisionConfig(image_size=64, variant="lite0"),
            image=ImagePolicy(),
        ),
        lambda: byte_level("smollm", CHATML),
    ),
}


def tiny(architecture: Architecture, seed: int = 0) -> LoadedParts:
    """A random model whose next word differs at every step."""
    tokenizer = architecture.tokenizer()
    rows = tokenizer.get_vocab_size()
    config = replace(architecture.config, decoder=replace(architecture.config.decoder, vocab_size=rows))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Llava(config)
        for name, parameter in model.named_parameters():
            if name.startswith(("decoder", "tower.blocks")) and parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.3 if name.startswith("decoder") else 0.1)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    state = {name: stored(tensor.detach()) for name, tensor in model.state_dict().items()}
    return LoadedParts(config, state, tokenizer, {})


def assistant(model: LoadedParts) -> Assistant:
    """The model in memory, to answer; adapters beside its weights."""
    llava = Llava(model.config)
    llava.load_state_dict({name: tensor.read() for name, tensor in model.state.items()})
    processor = Processor(model.config, OurTokenizer(model.tokenizer))
    return Assistant(llava.requires_grad_(False).eval(), processor)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, so that resampling matters as it does for photographs."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@dataclass
class Cell:
    """One format of one architecture; None where nothing was measured."""

    refused: str | None = None
    difference: float | None = None
    greedy: bool | None = None
    bytes: bool | None = None
    skipped: str | None = None  # what would have to be installed to run it
    note: str | None = None


def measure(name: str, to: str, folder: Path) -> Cell:
    """Export one architecture to one format under `folder`, and run what there is to run."""
    model = tiny(ARCHITECTURES[name])
    if to == "peft" and model.config.lora is None:
        return Cell(refused="no adapters")
    target = folder / to
    try:
        export(model, to, target, kind="f32")
    except InputError as error:
        return Cell(refused=str(error).partition(": ")[2])
    size = model.config.vision.image_size
    # llama.cpp resizes by filters of its own; a picture of the tower's size needs none.
    shown = picture(size, size) if to == "gguf" else picture(200, 120)
    if to == "llava":
        return Cell(bytes=same_bytes(model, target))
    if to == "hf":
        return run(model, shown, lambda: transformers(target, shown), same_bytes(model, target))
    if to == "gguf":
        return run_llama_cpp(model, shown, target)
    export(model, "hf", folder / "base", drop_lora=True)
    back = read_model(target, base=str(folder / "base"))
    return run(model, shown, lambda: transformers(folder / "base", shown, target), same(model, back))


def run(
    model: LoadedParts, shown: Image.Image | None, theirs: Callable[[], tuple[Tensor, list[int]]], same: bool
) -> Cell:
    """Ours beside theirs: logits, or what is left of them, and the next tokens."""
    try:
        logits, tokens = theirs()
    except ImportError as error:
        return Cell(bytes=same, skipped=str(error.name))
    own, following = ours(model, shown)
    tokens = tokens[: next((i for i, t in enumerate(tokens) if t in model.config.stop_token_ids), None)]
    if logits.dim() == 1:  # log-probabilities of the first token only
        own = own[-1].log_softmax(-1)
    known = own.shape[-1]  # an added <image> has rows behind ours
    return Cell(
        difference=(own - logits[..., :known]).abs().max().item(),
        greedy=tokens == following != [],
        bytes=same,
    )


def run_llama_cpp(model: LoadedParts, shown: Image.Image | None, folder: Path) -> Cell:
    """As `run`. A CLIP is compared with what llama.cpp makes of it as well; the closer of both counts."""
    same = same_decoder_bytes(model, folder)
    answer = functools.cache(lambda: llama_cpp(folder, shown))
    cell = run(model, shown, answer, same)
    if cell.difference is None or shown is None or model.config.vision.kind != "clip":
        return cell
    with class_token_last():
        other = run(model, shown, answer, same)
    if other.difference is None or other.difference > cell.difference:
        return cell
    return replace(other, note="class token last, as llama.cpp has it (its issue 25814)")


@contextlib.contextmanager
def class_token_last() -> Iterator[None]:
    """What llama.cpp has made of a CLIP since May 2025 (its issue 25814).

    The class token stands behind the patches, whose positions are therefore those of their neighbours, and
    the first feature is left out in its place.
    """

    def forward(self: ViT, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = self.pre_norm(torch.cat((x, self.class_token.expand(len(x), 1, -1)), 1) + self.positions)
        for block in self.blocks[: self.running]:
            x = block(x)
        return x[:, 1:]

    true, ViT.forward = ViT.forward, forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        ViT.forward = true  # type: ignore[method-assign]


def ours(model: LoadedParts, shown: Image.Image | None) -> tuple[Tensor, list[int]]:
    """Logits (T, V) of the question, and the greedy tokens after it."""
    answering = assistant(model)
    prompt = answering.prompt(question(shown), temperature=0.0, max_new_tokens=NEW_TOKENS)
    return answering.logits(shown, QUESTION), naive_generate(answering.model, prompt)


def question(shown: Image.Image | None) -> Conversation:
    return Conversation((user_message(QUESTION, [] if shown is None else [shown]),))


def transformers(folder: Path, shown: Image.Image, adapter: Path | None = None) -> tuple[Tensor, list[int]]:
    """The same from transformers, through its processor and its chat template."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=shown, text=text, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits[0]
        made = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return logits, made[0, inputs["input_ids"].shape[1] :].tolist()


def llama_cpp(folder: Path, shown: Image.Image | None) -> tuple[Tensor, list[int]]:
    """The first token's log-probabilities (V,) and the greedy tokens from llama.cpp."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    [params.model.path] = map(str, folder.glob("model-*.gguf"))
    for file in folder.glob("mmproj-*.gguf"):
        params.mmproj.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # f16 when not said
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    content: list[dict[str, Any]] = [{"type": "text", "text": QUESTION}]
    if shown is not None:
        stream = io.BytesIO()
        shown.save(stream, "PNG")
        data = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": data}})
    reply = xllamacpp.Server(params).handle_chat_completions(
        {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 1000,
        }
    )
    steps = reply["choices"][0]["logprobs"]["content"]
    first = {entry["id"]: entry["logprob"] for entry in steps[0]["top_logprobs"]}
    return torch.tensor([first[number] for number in sorted(first)]), [step["id"] for step in steps]


def same(model: LoadedParts, back: LoadedParts) -> bool:
    """Whether every tensor came back, bit for bit."""
    return all(
        name in back.state and torch.equal(tensor.read(), back.state[name].read()[: tensor.shape[0]])
        for name, tensor in model.state.items()
    )


def same_bytes(model: LoadedParts, folder: Path) -> bool:
    config, state = merged(model.config, model.state)
    return same(replace(model, config=config, state=state), read_model(folder, template=config.template))


def same_decoder_bytes(model: LoadedParts, folder: Path) -> bool:
    """Of GGUF only the language model is read back."""
    config, state = merged(model.config, model.state)
    decoder = {name: tensor for name, tensor in state.items() if name.startswith("decoder.")}
    [file] = folder.glob("model-*.gguf")
    return same(replace(model, config=config, state=decoder), read_model(file, template=config.template))


def table(only: list[str]) -> dict[str, dict[str, Cell]]:
    """architecture -> format -> cell, of architectures whose name contains one of `only`, or all."""
    names = [name for name in ARCHITECTURES if not only or any(part in name for part in only)]
    cells: dict[str, dict[str, Cell]] = {}
    for name in names:
        cells[name] = {}
        for to in FORMATS:
            with tempfile.TemporaryDirectory() as folder:
                cells[name][to] = measure(name, to, Path(folder))
    return cells


def printed(cells: dict[str, dict[str, Cell]]) -> Iterator[str]:
    """A table in Markdown."""
    yield "| architecture | format | largest difference | greedy tokens | bytes |"
    yield "|---|---|---|---|---|"
    words = {True: "equal", False: "**different**", None: "-"}
    for name, formats in cells.items():
        for to, cell in formats.items():
            if cell.refused is not None:
                yield f"| {name} | {to} | refused: {cell.refused} | | |"
                continue
            difference = "-" if cell.difference is None else f"{cell.difference:.1e}"
            note = f" ({cell.skipped} is not installed)" if cell.skipped else ""
            note += f" ({cell.note})" if cell.note else ""
            yield f"| {name} | {to} | {difference}{note} | {words[cell.greedy]} | {words[cell.bytes]} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--only", nargs="*", default=[], help="architectures whose name has one of these parts"
    )
    options = parser.parse_args()
    cells = table(options.only)
    if options.json:
        plain = {name: {to: asdict(cell) for to, cell in row.items()} for name, row in cells.items()}
        print(json.dumps(plain, indent=1))
    else:
        print("\n".join(printed(cells)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
