"""A probe with an ablation: how much an answer depends on what each layer reads from the picture.

    python examples/extend/probe.py MODEL PICTURE QUESTION

For each layer, its attention from text to image tokens is cut, and the log-probability that the answer loses
is printed. An `Attend` decides what a query sees, so the model itself stays as it is.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from pumice.assistant import Assistant, conversation_of, load
from pumice.config import IMAGE_TOKEN, DecoderConfig
from pumice.engine.generate import generate
from pumice.errors import InputError, WorkError
from pumice.explain.attention import log_probabilities
from pumice.model.layers import causal_mask, sdpa


class CutFromPicture:
    """Causal attention of one sequence, in which text does not see image tokens in one layer."""

    def __init__(self, config: DecoderConfig, is_image: Tensor, cut: int | None) -> None:
        """is_image: (T,) bool. cut: the number of the layer; None cuts nothing."""
        self.config, self.is_image, self.cut = config, is_image, cut

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(q.shape[2], device=q.device)
        mask = causal_mask(positions, positions, self.config.window(layer))
        if layer == self.cut:
            mask &= ~(self.is_image & ~self.is_image[:, None])  # rows are queries, columns keys
        return sdpa(q, k, v, mask, softcap=self.config.attention_softcap)


@torch.inference_mode()
def losses(assistant: Assistant, picture: str, question: str) -> list[float]:
    """Return the log-probability, in nats, that the model's own answer loses with each layer's attention."""
    # 1. The tokens of the question and of the model's answer.
    image = {"type": "image", "image": picture}
    asked = [{"role": "user", "content": [image, {"type": "text", "text": question}]}]
    prompt = assistant.prompt(conversation_of(asked), temperature=0.0, max_new_tokens=32)
    answer = [token for _, token in generate(assistant.model, [prompt]) if token is not None]
    tokens = torch.tensor(answer)
    # 2. Run prompt and answer once whole, and once for each layer.
    ids = torch.cat((prompt.input_ids, tokens[:-1]))
    model, image_tokens = assistant.model, prompt.encode_images()

    def log_probability(cut: int | None) -> float:
        attend = CutFromPicture(model.config.decoder, ids == IMAGE_TOKEN, cut)
        hidden = model(ids[None], image_tokens, attend=attend)[0, -len(tokens) :]
        return log_probabilities(model, hidden, tokens).sum().item()

    whole = log_probability(None)
    return [whole - log_probability(layer) for layer in range(model.config.decoder.depth)]


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"write: python {sys.argv[0]} MODEL PICTURE QUESTION")
    source, picture, question = sys.argv[1:]
    try:
        for layer, loss in enumerate(losses(load(source, quantize=None), picture, question)):
            print(f"layer {layer:3d}  {loss:7.3f} nats")
    except (InputError, WorkError) as error:
        sys.exit(str(error))
