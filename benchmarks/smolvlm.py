"""Time a random SmolVLM-256M of its real sizes beside transformers: first word and tokens a second.

    python benchmarks/smolvlm.py [--tokens 32] [--only pumice|transformers]

A picture of 1024 x 768 becomes 13 tiles, 832 image tokens. Weights are bf16, as published; transformers
computes in their type, Pumice with int8 in the language model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
from PIL import Image

from pumice import load
from pumice.config import ChatFormat, ModelConfig
from pumice.formats.export import export
from pumice.formats.hf.idefics3 import FAKE, MARKS, WHOLE
from pumice.model.llava import Llava
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import as_lazy
from pumice.templates import OWN
from pumice.train.shapes import published

CHAT = ChatFormat(
    user=("User:", "<end_of_utterance>\n"), assistant="Assistant:", stop="<end_of_utterance>",
    answer=(" ", ""),
    between="\n", specials=("<end_of_utterance>",), text_first=" ", image_line=False,
)  # fmt: skip


def config() -> ModelConfig:
    shape = published().llavas["HuggingFaceTB/SmolVLM-256M-Instruct"]
    vision = replace(shape.vision, fractional=True)
    image = replace(shape.image, mean=(0.5,) * 3, std=(0.5,) * 3, pad_color=(127,) * 3)
    text = {"template": OWN, "chat": CHAT, "stop_token_ids": (1,), "bos_token_id": 0}
    return replace(shape, vision=vision, image=image, marks=MARKS, **text)


def tokenizer() -> tokenizers.Tokenizer:
    specials = ["<|im_start|>", "<end_of_utterance>", FAKE, "<image>", WHOLE]
    specials += [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*specials, *letters])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(specials)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--only", choices=("pumice", "transformers"))
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    picture = Image.fromarray(noise).resize((1024, 768))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "hf"
        model = Llava(config()).bfloat16()
        state = {name: as_lazy(tensor.detach()) for name, tensor in model.state_dict().items()}
        export(LoadedParts(config(), state, tokenizer(), {}), "hf", folder)
        del model, state
        if options.only != "transformers":
            time_pumice(folder, picture, options.tokens)
        if options.only != "pumice":
            time_transformers(folder, picture, options.tokens)


def time_pumice(folder: Path, picture: Image.Image, tokens: int) -> None:
    assistant = load(folder)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    start = time.perf_counter()
    reply = assistant.stream([{"role": "user", "content": content}], max_new_tokens=tokens)
    reply.begin()
    while not reply.tokens:
        assistant.engine.step()
    first = time.perf_counter()
    "".join(reply)
    report("Pumice int8", first - start, reply.tokens - 1, time.perf_counter() - first)


def time_transformers(folder: Path, picture: Image.Image, tokens: int) -> None:
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    start = time.perf_counter()
    inputs = processor(text=text, images=[picture], return_tensors="pt").to(model.dtype)
    options = {"do_sample": False, "min_new_tokens": 1}
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=1, **options)
        first = time.perf_counter()
        model.generate(**inputs, max_new_tokens=tokens, **options | {"min_new_tokens": tokens})
    again = time.perf_counter()
    report("transformers", first - start, tokens - 1, again - first - (first - start))


def report(name: str, first: float, tokens: int, seconds: float) -> None:
    print(f"{name}: first word {first:.2f} s, then {tokens / max(seconds, 1e-6):.1f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
