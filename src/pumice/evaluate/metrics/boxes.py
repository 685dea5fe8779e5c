"""Boxes in answers: an answer is right if its box and the right one overlap enough (RefCOCO, Acc@0.5).

Source: the overlap of 0.5 is that of Mao et al. (arXiv 1511.02283, section 6). The first box of an answer is
compared, as in the scripts of Qwen-VL and InternVL.
"""

from __future__ import annotations

from collections.abc import Sequence

from pumice.boxes import Box, BoxMap

RIGHT_IOU = 0.5  # at least


def best_iou(text: str, boxes: BoxMap, truths: Sequence[Box]) -> float | None:
    """Return the IoU of an answer's first box with the right box that fits it best; None without a box.

    boxes: how the model writes them. truths: in pixels of the picture.
    """
    found = boxes.find(text)
    return max(found[0].box.iou(truth) for truth in truths) if found else None


def is_right(iou: float | None) -> float:
    """Return 1 for an overlap of at least RIGHT_IOU, else 0."""
    return float(iou is not None and iou >= RIGHT_IOU)
