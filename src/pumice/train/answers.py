"""Sample answers: a model that is in training answers a held-out question with its present weights.

Shapes: T tokens of the question and of the answer so far.
"""

from __future__ import annotations

import torch
from torch import nn

from pumice.engine.generate import generate
from pumice.engine.params import SamplingParams
from pumice.engine.requests import Prompt
from pumice.model.packed import Run
from pumice.processor import Sample
from pumice.train.features import ImageInput
from pumice.train.objective import Objective, PackTensors
from pumice.train.parallel import World

ANSWER_TOKENS = 40  # of the longest answer


def answer(sample: Sample, objective: Objective, wrapped: nn.Module, world: World) -> list[int]:
    """Return the tokens of a greedy answer to a prompt.

    wrapped: the objective as DDP or FSDP wrap it. Under FSDP every process must call this.
    """
    images = objective.features.fetch(sample.images, sample.layouts, mirror=False)
    if world.kind == "fsdp":
        return _without_cache(sample, images, objective, wrapped, world)
    model = objective.model
    with objective.autocast():
        features = objective.features.encode(images) if images else None
        image_tokens = None if features is None else model.connect(features, sample.layouts)
        ids = torch.from_numpy(sample.input_ids)
        prompt = Prompt(ids, image_tokens, SamplingParams(max_new_tokens=ANSWER_TOKENS))
        # A small cache: the memory belongs to the training.
        cells = min(len(ids) + ANSWER_TOKENS, model.config.decoder.context)
        answers = generate(model, [prompt], cache_tokens=cells)
        return [token for _, token in answers if token is not None]


def _without_cache(
    sample: Sample, images: list[ImageInput], objective: Objective, wrapped: nn.Module, world: World
) -> list[int]:
    """Answer with one whole pass per token, all processes in step: sharded weights have to be gathered."""
    ids, tokens = torch.from_numpy(sample.input_ids), list[int]()
    while len(tokens) < ANSWER_TOKENS:
        # One sequence, without supervised tokens: sources, targets and weights are empty.
        pack = PackTensors(
            input_ids=ids, positions=torch.arange(len(ids)), runs=[Run(len(ids))],
            sources=ids[:0], targets=ids[:0], weights=torch.zeros(0),
            images=images, layouts=sample.layouts,
        )  # fmt: skip
        token = world.gather(int(wrapped(pack, last=True).argmax()))[0]
        if token in objective.model.config.stop_token_ids:
            break
        tokens.append(token)
        ids = torch.cat((ids, torch.tensor([token])))
    return tokens
