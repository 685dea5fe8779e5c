"""Stage 0 of pumice-tiny: the connector learns to name what a picture shows, without running the LLM.

    python projects/pumice-tiny/warm.py recipes/pumice-tiny/0-warm.yaml

Aligning a fresh connector through a frozen LLM takes more pictures than a laptop can afford. Much of
what has to be learned is which direction of the LLM's embedding means what the picture shows, and that
can be learned without the LLM: of a picture's N image tokens t, the best match with the embedding e of
a word, log-mean-exp over t of t.e + bias, must tell the words of its captions from other words.

Shapes: B pictures, N image tokens, D decoder width, W words.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn

from pumice.conversation import ImagePart
from pumice.data.rows import ImageFinder, Rows
from pumice.errors import InputError
from pumice.tokens import Tokenizer
from pumice.train.features import TowerFeatures
from pumice.train.loop import schedule
from pumice.train.recipe import Recipe, load_recipe
from pumice.train.setup import Setup, prepare

COMMON = """a an the in on at of to and is are with his her their its it he she they while for from by as into
over through near up down out off this that there be being has have two three one some other another who which
what next very"""  # words that say little of a picture
RARE = 4  # pictures that must share a word before it is learned


def caption_words(recipe: Recipe) -> dict[str, Counter[str]]:
    """Picture -> how many of its captions use each word."""
    words: dict[str, Counter[str]] = defaultdict(Counter)
    for source in recipe.data:
        for row in Rows(source.rows):
            text = " ".join(text for speaker, text in row.turns if speaker == "gpt").lower()
            words[row.image[0]].update(set(re.findall(r"[a-z]+", text)).difference(COMMON.split()))
    return words


def targets(words: dict[str, Counter[str]], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Token ids (W,) of the words, and per picture what share of its words each is: (pictures, W)."""
    spread = Counter(word for counts in words.values() for word in counts)
    columns: dict[int, int] = {}
    cells: list[tuple[int, int, float]] = []
    for number, counts in enumerate(words.values()):
        for word, count in counts.items():
            pieces = tokenizer.pieces(" " + word)
            if spread[word] >= RARE and len(pieces) == 1:
                column = columns.setdefault(pieces[0][0], len(columns))
                cells.append((number, column, count * math.log(len(words) / spread[word])))
    table = torch.zeros(len(words), len(columns))
    for number, column, value in cells:
        table[number, column] += value
    return torch.tensor(list(columns)), table / table.sum(1, keepdim=True).clamp_min(1e-6)


def warm(setup: Setup, recipe: Recipe) -> list[float]:
    """Train the connector in place, on the pictures of the recipe's rows; returns each epoch's mean loss."""
    words = caption_words(recipe)
    finder = ImageFinder(recipe.pictures)
    images = [ImagePart(finder.find(name)) for name in words]
    ids, table = targets(words, setup.processor.tokenizer)
    look = TowerFeatures(setup.model, setup.processor, recipe.feature_cache, trains_tower=False)
    embeddings = setup.model.decoder.embed.weight[ids].detach().float()  # (W, D)
    size = setup.model.decoder.embed.weight.float().square().mean().sqrt()
    bias = nn.Parameter(table.mean(0).clamp_min(1e-6).log())
    rate = recipe.stage.learn["connector"]
    learned = [*setup.model.connector.parameters(), bias]
    optimizer = torch.optim.AdamW(learned, lr=rate, betas=recipe.betas, weight_decay=recipe.weight_decay)
    epochs, batch = round(recipe.epochs), recipe.batch
    per_epoch = len(images) // batch
    step, means = 0, []
    for epoch in track(range(epochs), "naming what pictures show"):
        total = 0.0
        order = torch.randperm(len(images)).tolist()
        for first in range(0, per_epoch * batch, batch):
            picked = order[first : first + batch]
            mirrored = torch.rand(batch) < recipe.mirror_chance
            features = torch.cat([look([images[i]], bool(m)) for i, m in zip(picked, mirrored, strict=True)])
            tokens = setup.model.connect(features).float()  # (B, N, D)
            scores = torch.logsumexp(tokens @ embeddings.T, 1) - math.log(tokens.shape[1]) + bias  # (B, W)
            loss = -(table[picked] * scores.log_softmax(-1)).sum(-1).mean()
            # an image token should be about as long as a word's embedding, which the LLM expects
            loss = loss + (tokens.square().mean(-1).sqrt() / size - 1).square().mean()
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(step, epochs * per_epoch, recipe.warmup)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.item()
            step += 1
        means.append(total / per_epoch)
        print(f"epoch {epoch + 1}: loss {means[-1]:.3f}")
    look.close()
    return means


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of pumice train")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.set)
    torch.manual_seed(recipe.seed)
    setup = prepare(recipe)
    means = warm(setup, recipe)
    setup.save(recipe.output / "model", {"recipe": recipe.model_dump(mode="json"), "losses": means})


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
