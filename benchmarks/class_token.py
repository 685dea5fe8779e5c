"""How far answers about pictures are from right ones where llama.cpp puts a CLIP's class token last.

    python benchmarks/class_token.py [--steps 1500] [--seed 0]

A small LLaVA with a CLIP-like tower (6 x 6 patches) learns to say colour, shape and quadrant of an object in
a noisy picture; weights are drawn, and everything learns. New pictures are then shown to three towers: as it
was trained, as llama.cpp computes it since May 2025 (its issue 25814), and the same with the positions that
`pumice export --to gguf --class-token shifted` writes. `formats.class_token_last` stands for llama.cpp, with
which tests compare it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time

import torch
from formats import class_token_last
from torch import Tensor
from torch.nn import functional

from pumice.config import IMAGE_TOKEN, ConnectorConfig, DecoderConfig, ModelConfig, VisionConfig
from pumice.model.llava import Llava

SIDE, PATCH, GRID = 84, 14, 6
COLOURS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1.0]])
QUESTIONS = ("colour", "shape", "quadrant")  # tokens 0, 1, 2; answers follow
ANSWERS = {"colour": (3, 6), "shape": (9, 2), "quadrant": (11, 4)}  # first token, number of answers


def config() -> ModelConfig:
    vision = VisionConfig("clip", SIDE, 64, PATCH, depth=4, heads=4, mlp_width=128, activation="quick_gelu")
    decoder = DecoderConfig(
        vocab_size=16, width=64, depth=3, heads=4, kv_heads=4, head_dim=16, mlp_width=128, context=64
    )
    return ModelConfig(decoder, vision, ConnectorConfig())


def batch(size: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Pictures (B, 3, S, S), ids (B, N + 1) with a random question, right answers to all questions."""
    pixels = 0.5 + 0.3 * torch.randn(size, 3, SIDE, SIDE)
    colour, shape = torch.randint(6, (size,)), torch.randint(2, (size,))
    across, down = torch.randint(0, SIDE - 27, (2, size))
    for n in range(size):
        x, y = int(across[n]), int(down[n])
        pixels[n, :, y : y + 28, x : x + 28] = COLOURS[colour[n], :, None, None]
        if shape[n]:  # a ring
            pixels[n, :, y + 9 : y + 19, x + 9 : x + 19] = 0.5
    quadrant = (across + 14 >= SIDE // 2).long() + 2 * (down + 14 >= SIDE // 2).long()
    ids = torch.full((size, GRID**2 + 1), IMAGE_TOKEN)
    ids[:, -1] = torch.randint(3, (size,))
    return (pixels - 0.5) / 0.3, ids, {"colour": colour + 3, "shape": shape + 9, "quadrant": quadrant + 11}


def logits(model: Llava, pixels: Tensor, ids: Tensor) -> Tensor:
    return model.decoder.logits(model(ids, model.encode(pixels))[:, -1])


def train(steps: int) -> Llava:
    model = Llava(config())
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        pixels, ids, right = batch(64)
        answers = torch.stack([right[name] for name in QUESTIONS], 1).gather(1, ids[:, -1:]).flatten()
        loss = functional.cross_entropy(logits(model, pixels, ids), answers)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 100 == 0:
            print(
                f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", file=sys.stderr
            )
    return model.eval()


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    with torch.inference_mode(False):
        model = train(options.steps)
    pixels, ids, right = batch(1000)
    positions = model.tower.positions.clone()
    expected: dict[str, Tensor] = {}
    print("| tower | " + " | ".join(f"{name}: right, as before" for name in QUESTIONS) + " | logits |")
    print("|---|---|---|---|---|")
    for title, last, rolled in (
        ("as trained", False, False),
        ("class token last", True, False),
        ("class token last, positions shifted", True, True),
    ):
        model.tower.positions.copy_(positions.roll(-1, 0) if rolled else positions)
        cells, worst = [], []
        with class_token_last() if last else contextlib.nullcontext():
            for number, name in enumerate(QUESTIONS):
                first, count = ANSWERS[name]
                ids[:, -1] = number
                found = logits(model, pixels, ids)[:, first : first + count]
                expected.setdefault(name, found)
                chosen = found.argmax(1)
                correct = (chosen + first == right[name]).float().mean()
                same = (chosen == expected[name].argmax(1)).float().mean()
                cells.append(f"{correct:.1%}, {same:.1%}")
                worst.append((found - expected[name]).square().mean().sqrt().item())
        spread = torch.cat(list(expected.values()), 1).std().item()
        print(f"| {title} | {' | '.join(cells)} | {max(worst) / spread:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
