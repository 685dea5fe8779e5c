"""The boxes that an answer holds, for a page that draws them on its picture."""

from __future__ import annotations

from pydantic import BaseModel, Field

from pumice.boxes import Box, box_map
from pumice.config import ModelConfig
from pumice.serve.protocol import MAX_MESSAGES, BaseRequest

LONGEST = 1 << 16  # characters of an answer
LARGEST_SIDE = 1 << 17  # pixels of a picture


class BoxesRequest(BaseRequest):
    """An answer of the model about a picture, to be searched for boxes."""

    text: str = Field(max_length=LONGEST)
    width: int = Field(ge=1, le=LARGEST_SIDE, description="Of the picture as it is upright, in pixels.")
    height: int = Field(ge=1, le=LARGEST_SIDE)
    pictures: int = Field(1, ge=1, le=MAX_MESSAGES, description="How many its conversation has.")


class AnswerBox(BaseModel):
    """In shares of the picture's sides, from its left upper corner."""

    label: str = Field(description="What the answer calls it; may be empty.")
    left: float
    top: float
    right: float
    bottom: float


class BoxesBody(BaseModel):
    boxes: list[AnswerBox]


def boxes_in(config: ModelConfig, request: BoxesRequest) -> BoxesBody:
    """Return the boxes in an answer of the model. What lies outside of the picture is cut off."""
    width, height = request.width, request.height
    boxes = []
    for found in box_map(config, (width, height), request.pictures).find(request.text):
        inside = found.box.meet(Box(0, 0, width, height))
        if inside.right >= inside.left and inside.bottom >= inside.top:
            boxes.append(AnswerBox(label=found.label, **vars(inside.scaled(1 / width, 1 / height))))
    return BoxesBody(boxes=boxes)
