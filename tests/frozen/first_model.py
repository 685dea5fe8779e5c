"""A tiny random LLaVA 1.6 as transformers writes it, from which `make.py` begins, without Pumice."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
)

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
TILES = [[16, 32], [32, 16], [32, 32]]


def write(folder: Path) -> None:
    """4 image tokens a tile, two blocks of width 32, bytes as tokens, weights large enough to be sure."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    learner = tokenizers.trainers.BpeTrainer(
        vocab_size=264,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant What is it?"], learner)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16,
        patch_size=8, projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=3,
        image_grid_pinpoints=TILES,
        tie_word_embeddings=False,
    )
    tokens = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
        # It writes letters that can be read: text tells bytes that are no UTF-8 from nothing else.
        plain = [token.isascii() and token.isprintable() for token in tokens]
        model.lm_head.weight[~torch.tensor(plain)] = 0
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    settings = {
        "image_processor_type": "LlavaNextImageProcessor",
        "crop_size": {"height": 16, "width": 16},
        "size": {"shortest_edge": 16},
        "image_grid_pinpoints": TILES,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
