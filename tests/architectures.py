"""Tiny random LLaVAs of every architecture, with tokenizers of every kind; for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tokenizers
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from pumice.assistant import Assistant
from pumice.config import (
    ChatFormat,
    ConnectorConfig,
    DecoderConfig,
    ImagePolicy,
    LoraConfig,
    ModelConfig,
    RopeScaling,
    VisionConfig,
)
from pumice.formats.gguf.tokenizer import PRE_TOKENIZERS
from pumice.formats.hf.idefics3 import FAKE, MARKS, WHOLE
from pumice.formats.llava.read import IMAGE_WRAP
from pumice.formats.text.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, SentencePiece
from pumice.media import VideoPolicy
from pumice.model.adapters import merge_lora
from pumice.model.llava import Llava
from pumice.model.quantized import quantize
from pumice.processor import Processor
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import as_lazy
from pumice.templates import OWN
from pumice.tokens import Tokenizer as OurTokenizer

TEXT = ["user assistant system human What is in the picture? A dog runs over the green field."] * 4
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


def perturbed(build: Callable[[], Any]) -> Any:
    """Build a module with random parameters, also where fresh ones are all zero (biases) or one (norms)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build().eval()
        for parameter in module.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return module


def sentencepiece(legacy: bool = True) -> Tokenizer:
    """As Llama's, with its bytes; 3 control tokens. legacy: each piece of text begins with a space."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    learner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=100, show_progress=False))
    words = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    letters = [word for word, _ in words if len(word) == 1]
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    longer = [word for word, _ in words if len(word) > 1]
    pieces += [(word, -float(rank), NORMAL) for rank, word in enumerate([*longer, *letters])]
    model = SentencePiece(pieces, model_type=2, charsmap=b"", remove_spaces=False)
    return model.tokenizer("a tiny model", legacy=legacy)


def with_picture_marks() -> Tokenizer:
    """The same with what LLaVA 1.0 puts around a picture."""
    tokenizer = sentencepiece()
    tokenizer.add_special_tokens(list(IMAGE_WRAP))
    return tokenizer


def byte_level(split: str, specials: list[str]) -> Tokenizer:
    """Byte-pair encoding of bytes, which splits words as `split` says (a name of llama.cpp's)."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    learner = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, learner)
    return tokenizer


SMOLVLM = ["<end_of_utterance>", FAKE, "<image>", WHOLE]  # and a token for each tile
SMOLVLM += [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
DECODER = DecoderConfig(
    vocab_size=0, width=64, depth=2, heads=4, kv_heads=2, head_dim=16, mlp_width=96, context=1024
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
            image_wrap=IMAGE_WRAP,
        ),
        with_picture_marks,
    ),
    "CLIP + Mistral, anyres (LLaVA 1.6)": Architecture(
        _vicuna(
            decoder=replace(DECODER, sliding_window=256),
            image=replace(PAD, mode="anyres", pinpoints=TILES),
            template="mistral_instruct",
        ),
        lambda: sentencepiece(legacy=False),
    ),
    "CLIP + Mistral, pad": Architecture(
        _vicuna(decoder=replace(DECODER, sliding_window=512), template="mistral_instruct"), sentencepiece
    ),
    "CLIP + Llama 3, pad": Architecture(
        _chatml(
            replace(DECODER, rope_theta=500000.0, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
            bos_token_id=0,
        ),
        lambda: byte_level("llama-bpe", ["<|begin_of_text|>", *CHATML[1:]]),
    ),
    "SigLIP + Qwen2, squash": Architecture(
        _chatml(
            replace(DECODER, qkv_bias=True, norm_eps=1e-6, rope_theta=1e6),
            vision=SIGLIP,
            image=ImagePolicy("squash", HALF, HALF, pad_color=(127, 127, 127)),
        ),
        lambda: byte_level("qwen2", CHATML),
    ),
    "LLaVA-OneVision, anyres_max": Architecture(
        _chatml(
            replace(DECODER, qkv_bias=True, norm_eps=1e-6, rope_theta=1e6),
            vision=replace(SIGLIP, layer=-1),
            image=ImagePolicy(
                "anyres", HALF, HALF, pad_color=(127, 127, 127), pinpoints=TILES, max_tiles=1
            ),  # so that the tiles of most pictures are shrunk
            video=VideoPolicy(pool=2),
        ),
        lambda: byte_level("qwen2", CHATML),
    ),
    "CLIP + Qwen3, crop": Architecture(
        _chatml(
            replace(DECODER, qk_norm=True, norm_eps=1e-6, tied_head=True, head_dim=32),
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
    "SigLIP + Gemma 2, squash": Architecture(
        _chatml(
            replace(
                DECODER,
                tied_head=True,
                norm_eps=1e-6,
                sliding_window=48,
                window_pattern=2,
                post_norms=True,
                activation="gelu_tanh",
                norm_offset=1.0,
                embed_scale=8.0,
                attention_scale=24**-0.5,
                attention_softcap=20.0,  # and no logit_softcap, which transformers' LLaVA leaves out
            ),
            vision=replace(SIGLIP, layer=-1),
            image=ImagePolicy("squash", HALF, HALF, pad_color=(127, 127, 127)),
            template=OWN,
            chat=ChatFormat(
                user=("<start_of_turn>user\n", "<end_of_turn>\n"),
                assistant="<start_of_turn>model\n",
                stop="<end_of_turn>",
                between="\n",
                specials=("<start_of_turn>", "<end_of_turn>"),
                trim=("user", "assistant"),
            ),
            bos_token_id=0,
        ),
        lambda: byte_level("smollm", ["<bos>", "<start_of_turn>", "<end_of_turn>"]),
    ),
    "SigLIP, split (SmolVLM)": Architecture(
        _chatml(
            replace(DECODER, tied_head=True),
            vision=replace(SIGLIP, layer=-1, final_norm=True, fractional=True),
            connector=ConnectorConfig("linear", "pixel_shuffle", 2, bias=False),
            image=ImagePolicy(
                "split", HALF, HALF, "lanczos", pad_color=(127, 127, 127), longest_edge=3 * SIGLIP.image_size
            ),
            marks=MARKS,
            template=OWN,
            chat=ChatFormat(
                user=("User:", "<end_of_utterance>\n"),
                assistant="Assistant:",
                stop="<end_of_utterance>",
                answer=(" ", ""),
                between="\n",
                system=("System: ", "<end_of_utterance>\n"),
                specials=("<end_of_utterance>",),
                text_first=" ",
                image_line=False,
            ),
            stop_token_ids=(1,),
            bos_token_id=0,
        ),
        lambda: byte_level("smollm", ["<|im_start|>", *SMOLVLM]),
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
    state = {name: as_lazy(tensor.detach()) for name, tensor in model.state_dict().items()}
    return LoadedParts(config, state, tokenizer, {})


def assistant(model: LoadedParts) -> Assistant:
    """The model in memory, to answer; adapters beside its weights."""
    return Assistant(llava(model), Processor(model.config, OurTokenizer(model.tokenizer)))


def llava(parts: LoadedParts) -> Llava:
    """The model in memory, frozen; adapters beside its weights."""
    model = Llava(parts.config)
    model.load_state_dict({name: tensor.read() for name, tensor in parts.state.items()})
    return model.requires_grad_(False).eval()


def merged(parts: LoadedParts, bits: str | None, device: str | torch.device) -> Llava:
    """The model on a device, adapters merged. bits: int8 or int4, in which it is quantised before."""
    model = llava(parts)
    merge_lora(model.decoder)
    if bits:
        quantize(model.decoder, bits)
    return model.to(device)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, so that resampling matters as it does for photographs."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
