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
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from command import run
from rich.progress import track
from torch import Tensor, nn

from pumice.conversation import ImagePart
from pumice.data.rows import ImageFinder, Rows
from pumice.errors import InputError
from pumice.files import replacing
from pumice.tokens import Tokenizer
from pumice.train.features import ImageInput, TowerFeatures
from pumice.train.loop import schedule
from pumice.train.recipe import Recipe, RowSource, load_recipe
from pumice.train.setup import Setup, prepare

COMMON = """a an the in on at of to and is are with his her their its it he she they while for from by as into
over through near up down out off this that there be being has have two three one some other another who which
what next very"""  # words that say little of a picture
RARE = 4  # pictures that must share a word before it is learned


def telling_words(text: str) -> set[str]:
    """The words of captions that say something of a picture."""
    return set(re.findall(r"[a-z]+", text.lower())).difference(COMMON.split())


def caption_words(sources: Sequence[RowSource]) -> dict[str, Counter[str]]:
    """Picture -> how many of its captions use each word."""
    words: dict[str, Counter[str]] = defaultdict(Counter)
    for source in sources:
        for row in Rows(source.rows):
            text = " ".join(text for speaker, text in row.turns if speaker == "gpt")
            words[row.image[0]].update(telling_words(text))
    return words


@dataclass(frozen=True)
class Vocabulary:
    """The words to tell apart: the token of each that is one token (W of them), and how rare it is."""

    columns: dict[int, int]  # token -> column
    rarity: dict[str, float]  # word -> log of how few pictures share it
    tokens: dict[str, int]

    @classmethod
    def of(cls, words: dict[str, Counter[str]], tokenizer: Tokenizer) -> Vocabulary:
        spread = Counter(word for counts in words.values() for word in counts)
        tokens: dict[str, int] = {}
        for word in dict.fromkeys(word for counts in words.values() for word in counts):
            pieces = tokenizer.pieces(" " + word)
            if spread[word] >= RARE and len(pieces) == 1:
                tokens[word] = pieces[0][0]
        columns = {token: number for number, token in enumerate(dict.fromkeys(tokens.values()))}
        return cls(columns, {word: math.log(len(words) / spread[word]) for word in tokens}, tokens)

    def targets(self, words: dict[str, Counter[str]]) -> Tensor:
        """(pictures, W): what share of a picture's words each is."""
        table = torch.zeros(len(words), len(self.columns))
        for number, counts in enumerate(words.values()):
            for word, count in counts.items():
                if word in self.tokens:
                    table[number, self.columns[self.tokens[word]]] += count * self.rarity[word]
        return table / table.sum(1, keepdim=True).clamp_min(1e-6)


class Naming:
    """The connector and a bias for each word, and what they are told by: pictures and their words."""

    def __init__(self, setup: Setup, recipe: Recipe) -> None:
        self.model, self.recipe = setup.model, recipe
        words = caption_words(recipe.data)
        self.vocabulary = Vocabulary.of(words, setup.processor.tokenizer)
        self.finder = ImageFinder(recipe.pictures)
        self.processor = setup.processor
        self.tower = TowerFeatures(setup.model, setup.processor, recipe.feature_cache, trains_tower=False)
        self.images, self.table = self._read(words)
        ids = torch.tensor(list(self.vocabulary.columns))
        self.embeddings = setup.model.decoder.embed.weight[ids].detach().float()  # (W, D)
        self.size = setup.model.decoder.embed.weight.float().square().mean().sqrt()
        self.bias = nn.Parameter(self.table.mean(0).clamp_min(1e-6).log())

    def _read(self, words: dict[str, Counter[str]]) -> tuple[list[ImagePart], Tensor]:
        return [ImagePart(self.finder.find(name)) for name in words], self.vocabulary.targets(words)

    def losses(
        self, images: Sequence[ImagePart], table: Tensor, mirrored: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        """(how badly the words are told, how far tokens are from the length of a word's embedding)."""
        inputs: list[ImageInput] = []
        for image, mirror in zip(images, mirrored, strict=True):
            inputs += self.tower.fetch([image], self.processor.layouts([image]), mirror)
        features = self.tower.encode(inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            tokens = self.model.connect(features)  # (B, N, D)
            similar = tokens @ self.embeddings.T
        tokens, similar = tokens.float(), similar.float()
        scores = torch.logsumexp(similar, 1) - math.log(tokens.shape[1]) + self.bias
        loss_value = -(table * scores.log_softmax(-1)).sum(-1).mean()
        return loss_value, (tokens.square().mean(-1).sqrt() / self.size - 1).square().mean()

    @torch.no_grad()
    def held_out(self) -> float | None:
        """How badly the words of held-out pictures are told; None where the recipe has none."""
        if not self.recipe.held_out:
            return None
        images, table = self._read(caption_words(self.recipe.held_out))
        batch = self.recipe.batch
        epoch_losses = [
            self.losses(images[n : n + batch], table[n : n + batch], [False] * len(images[n : n + batch]))[0]
            * len(images[n : n + batch])
            for n in range(0, len(images), batch)
        ]
        return float(sum(epoch_losses)) / len(images)


def warm(setup: Setup, recipe: Recipe) -> list[float]:
    """Train the connector in place, on the pictures of the recipe's rows; returns each epoch's mean loss.

    Every epoch's end is kept in `output`/epoch.pt, from which the same recipe goes on. Raises InputError
    where there are fewer pictures than a batch has.
    """
    naming = Naming(setup, recipe)
    rate = recipe.stage.learn["connector"]
    learned = [*setup.model.connector.parameters(), naming.bias]
    optimizer = torch.optim.AdamW(learned, lr=rate, betas=recipe.betas, weight_decay=recipe.weight_decay)
    epochs, batch = round(recipe.epochs), recipe.batch
    per_epoch = len(naming.images) // batch
    if not per_epoch:
        raise InputError(f"the rows show {len(naming.images)} pictures, fewer than the batch of {batch}")
    checkpoint_path = recipe.output / "epoch.pt"
    means = resume(checkpoint_path, recipe, learned, optimizer)
    step = len(means) * per_epoch
    for epoch in track(range(len(means), epochs), "naming what pictures show"):
        total = 0.0
        order = torch.randperm(len(naming.images)).tolist()
        for first in range(0, per_epoch * batch, batch):
            picked = order[first : first + batch]
            mirrored = (torch.rand(batch) < recipe.mirror_chance).tolist()
            loss_value, long = naming.losses(
                [naming.images[i] for i in picked], naming.table[picked], mirrored
            )
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(step, epochs * per_epoch, recipe.warmup)
            (loss_value + long).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += (loss_value + long).item()
            step += 1
        means.append(total / per_epoch)
        held = naming.held_out()
        print(f"epoch {epoch + 1}: loss {means[-1]:.3f}" + ("" if held is None else f", held out {held:.3f}"))
        keep(checkpoint_path, recipe, learned, optimizer, means)
    naming.tower.close()
    return means


def keep(
    path: Path,
    recipe: Recipe,
    learned: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    means: list[float],
) -> None:
    """An epoch's end: weights, moments, random numbers and what the recipe says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "recipe": recipe.model_dump_json(exclude={"feature_cache", "pictures", "output"}),
        "weights": [parameter.detach() for parameter in learned],
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "means": means,
    }
    with replacing(path) as file:
        torch.save(state, file.buffer)


def resume(
    path: Path, recipe: Recipe, learned: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[float]:
    """Go on from `keep`'s file: the epochs' mean losses so far, [] where there is none. Raises InputError."""
    if not path.exists():
        return []
    state = torch.load(path, weights_only=True)
    if state["recipe"] != recipe.model_dump_json(exclude={"feature_cache", "pictures", "output"}):
        raise InputError(f"{path} is of another recipe; remove it or name another output")
    with torch.no_grad():
        for parameter, weights in zip(learned, state["weights"], strict=True):
            parameter.copy_(weights)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    return list(state["means"])


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
    run(main)
