"""What one step of a stage takes: bytes alive at most, and floating-point operations.

Knows the model's modules, and runs them. Nothing is computed: the step runs forward and backward on
PyTorch's fake tensors, which have shapes and types and no contents, while every storage is counted from its
making to its end. So checkpointing, autocast and packed attention are counted as they are, not as a formula
remembers them. Blocks are alike: a decoder of two and one of four say what each further block adds.

Shapes: T tokens, P squares of pixels, F features of a square, C tower width, S supervised predictions.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pumice.config import ModelConfig
from pumice.model.layers import rope_inv_freq
from pumice.model.llava import Llava
from pumice.model.packed import Packed, Run
from pumice.model.quantized_base import quantize_base
from pumice.model.vision import ViT
from pumice.train.features import TILES_PER_CALL
from pumice.train.loss import CHUNK, supervised_loss
from pumice.train.memory import checkpoint_blocks
from pumice.train.recipe import Recipe
from pumice.train.setup import learned
from pumice.train.sizes import kept_as

DEPTHS = (2, 4)  # blocks of the decoders that run; what they differ by is what two blocks take


@dataclass(frozen=True)
class PackShape:
    """One pack: what is computed at once."""

    runs: tuple[Run, ...]  # tokens of each sample; branches, where samples share a beginning
    tiles: int  # of pixels, all pictures together
    image_tokens: int  # among the tokens
    supervised: int  # predictions

    @property
    def tokens(self) -> int:
        return sum(run.length for run in self.runs)


@dataclass(frozen=True)
class Footprint:
    """Bytes that are alive only while a step runs, and operations of one pack."""

    activations: float  # alive at most in a step beyond weights and gradients
    logits: float  # the share of the activations that the vocabulary projection has
    picture: float  # alive at most while a frozen tower looks at a few squares
    flops: float  # of a pack: forward, backward, what is computed again
    tower_flops: float  # of one square, forward


class _Count(TorchDispatchMode):
    """Counts the bytes of the storages made under it, now and at most, and operations.

    Not `FlopCounterMode`: what it keeps of a pass with checkpointing would be counted as alive.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """tensors: left out of the count, as they are there before."""
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (flops := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += flops(*args, **(kwargs or {}), out_val=out)
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._hold(value)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def measure(recipe: Recipe, config: ModelConfig, work: PackShape, device: str) -> Footprint:
    """The footprint of the recipe's stage on a device of this type ("cpu", "cuda") for such packs."""
    low, high = (_run(recipe, config, work, depth, device) for depth in DEPTHS)
    blocks = (config.decoder.depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])

    def whole(name: str) -> float:
        first: float = getattr(low, name)
        second: float = getattr(high, name)
        return first + (second - first) * blocks

    return Footprint(
        activations=whole("activations"), logits=low.logits, picture=low.picture, flops=whole("flops"),
        tower_flops=low.tower_flops,
    )  # fmt: skip


def _run(recipe: Recipe, config: ModelConfig, work: PackShape, depth: int, device: str) -> Footprint:
    cut = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, depth=depth))
    rope = (cut.decoder.head_dim, cut.decoder.rope_theta, cut.decoder.rope_scaling)
    rope_inv_freq(*rope, torch.device("cpu"))  # kept for good by its cache: it must not be a fake one
    with FakeTensorMode(allow_non_fake_inputs=True), _quiet():
        model = _model(recipe, cut, device)
        picture, tower_flops = _look(model, config, work.tiles) if depth == DEPTHS[0] else (0.0, 0.0)
        held = [*model.parameters(), *model.buffers()]
        for parameter in model.parameters():
            if parameter.requires_grad:  # every pack of a step but the first finds gradients
                parameter.grad = torch.zeros_like(parameter)
                held.append(parameter.grad)
        with _Count(held) as count:
            _step(model, recipe, config, work, device)
    size = 2 if recipe.precision == "bf16" else 4
    return Footprint(
        activations=count.peak,
        logits=min(CHUNK, work.supervised) * config.decoder.vocab_size * (4 + size),
        picture=picture,
        flops=count.flops,
        tower_flops=tower_flops,
    )


def _model(recipe: Recipe, config: ModelConfig, device: str) -> Llava:
    """The model as `prepare` sets it up for the stage, without contents."""
    with torch.device("meta"):
        model = Llava(config)
    learn = recipe.stage.learn
    learning = learned(model, learn)
    state = {
        name: torch.empty(
            tensor.shape,
            dtype=kept_as(name, name in learning, recipe, device)
            if tensor.is_floating_point()
            else tensor.dtype,
        )
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    if recipe.stage.base != "none":
        quantize_base(model.decoder, "int8")  # what nf4's weights take is no matter here
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)
    checkpoint_blocks(model.decoder.blocks, recipe.checkpointing)
    if "tower" in learn and isinstance(model.tower, ViT):
        checkpoint_blocks(model.tower.blocks, recipe.checkpointing)
    return model.train()


def _step(model: Llava, recipe: Recipe, config: ModelConfig, work: PackShape, device: str) -> None:
    """One pack forward and backward, as the loop computes it."""
    tokens = work.tokens
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    here = torch.zeros(1, tokens, 1, dtype=torch.bool)
    learns = "tower" in recipe.stage.learn
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
        image_tokens = None
        if work.tiles:
            with torch.set_grad_enabled(learns), torch.autocast("cpu", enabled=False):
                features = _features(model, config, work.tiles, learns)
            weight = next(model.connector.parameters(), None)
            seen = model.connector(features if weight is None else features.to(weight.dtype))
            image_tokens = seen.flatten(0, 1)[: work.image_tokens]
        x = model.decoder.embed(ids)
        if image_tokens is not None:
            x = x.masked_scatter(here, image_tokens.to(x.dtype))
        attend = Packed(work.runs, config.decoder.sliding_window, x.device)
        rows = torch.zeros(work.supervised, dtype=torch.int64)
        hidden = model.decoder(x, torch.zeros(1, tokens, dtype=torch.int64), attend, rows=rows)
        loss = supervised_loss(hidden[0], model.decoder.head_weight, rows, torch.ones(work.supervised))
    if loss.requires_grad:
        loss.backward()


def _features(model: Llava, config: ModelConfig, tiles: int, learns: bool) -> Tensor:
    vision = config.vision
    dtype = next(model.tower.parameters()).dtype
    if learns:
        side = vision.image_size
        return model.features(torch.empty(tiles, 3, side, side, dtype=dtype))
    return torch.empty(tiles, vision.features, vision.width, dtype=dtype)


def _look(model: Llava, config: ModelConfig, tiles: int) -> tuple[float, float]:
    """(bytes at most, operations of one square) of the tower on a few squares, nothing learning."""
    if config.vision.kind == "none" or not tiles:
        return 0.0, 0.0
    together = min(TILES_PER_CALL, tiles)
    side = config.vision.image_size
    with torch.no_grad(), _Count([*model.tower.parameters(), *model.tower.buffers()]) as count:
        model.features(torch.empty(together, 3, side, side))
    return float(count.peak), count.flops / together


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's generator: drawing fake weights moves it."""
    with torch.random.fork_rng(devices=[]):
        yield
