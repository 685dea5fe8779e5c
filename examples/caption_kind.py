"""A kind of instruction data of one's own, small enough for a small teacher that sees the picture.

pumice data generate runs/here --teacher local --model pumice-tiny --show --no-told \
    --kind examples/caption_kind.py --jsonl pictures.jsonl --images photos
"""

from __future__ import annotations

from pumice.synth.kinds.base import Kind, whole

KIND = Kind(
    name="caption",
    system="Describe the image concisely.",
    examples=(),
    parse=whole(("What is shown here?", "Describe this picture in a sentence.", "What do you see?")),
    words=(4, 40),
    max_tokens=48,
    unsupported=0,
)
