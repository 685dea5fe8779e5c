"""Measure the peak memory and the FLOPs of one training step without computing it.

The step runs forward and backward on PyTorch's fake tensors, which have shapes and types but no contents.
Every storage is counted from its allocation until it is freed. So checkpointing, autocast and packed
attention count as they run, and no formula has to follow the model. All decoder blocks are alike: the step
runs with three blocks and with five, and the difference says what each further block adds. The peak of a deep
model may come at another moment than a shallow one's, so each moment is extended, and the largest taken.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pumice.config import ModelConfig
from pumice.model.layers import rope_inv_freq
from pumice.model.llava import Llava
from pumice.model.packed import PackedAttention, Run
from pumice.model.quantized_base import quantize_base
from pumice.model.vision import ViT
from pumice.train.features import TILES_PER_CALL
from pumice.train.loss import CHUNK, supervised_loss
from pumice.train.memory import checkpoint_blocks
from pumice.train.recipe import Recipe
from pumice.train.setup import trainable_parameters
from pumice.train.sizes import memory_dtype

DEPTHS = (3, 5)  # blocks of the two decoders that run


@dataclass(frozen=True)
class PackShape:
    """The sizes of one pack, which goes through the model in one forward pass."""

    runs: tuple[Run, ...]  # tokens of each sample, or of each branch where samples share a prefix
    tiles: int  # of all images together
    image_tokens: int  # how many of the tokens are image tokens
    supervised: int  # supervised tokens

    @property
    def tokens(self) -> int:
        return sum(run.length for run in self.runs)


@dataclass(frozen=True)
class Footprint:
    """Bytes in use only while a step runs, and the FLOPs of one pack."""

    activations: float  # peak bytes of a step, without weights and gradients
    logits: float  # the bytes of them that the vocabulary projection needs
    tower_pass: float  # peak bytes while a frozen tower encodes a few tiles
    flops: float  # of a pack: forward, backward, and what checkpointing computes again
    tower_flops: float  # of one tile, forward


class MemoryCounter(TorchDispatchMode):
    """Count the bytes of the storages that are allocated under it, with their peak, and the FLOPs.

    PyTorch's `FlopCounterMode` cannot do it: it keeps tensors of a checkpointed pass, which would count here.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """tensors: those that exist before and do not count."""
        super().__init__()
        self.current = self.flops = 0
        self.moment = "begin"
        self.peaks = {self.moment: 0}
        # Several tensors may view one storage, so storages are counted, each by its address.
        self._storages = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (flops := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += flops(*args, **(kwargs or {}), out_val=out)
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._count_storage(value)
        return out

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    def enter(self, moment: str) -> None:
        """Count what follows as another moment of the step."""
        self.moment = moment
        self.peaks[moment] = max(self.peaks.get(moment, 0), self.current)

    def watch(self, blocks: Sequence[nn.Module]) -> None:
        """Take the first block, the last, and those between as moments, forward and backward.

        From one block between them to the next, memory grows or shrinks evenly. The last block computes fewer
        rows than the others.
        """

        def name_of(block: nn.Module) -> str:
            return "first" if block is blocks[0] else "last" if block is blocks[-1] else "middle"

        def before(block: nn.Module, args: tuple[Any, ...]) -> None:
            self.enter(f"forward, {name_of(block)}")
            if block is blocks[0] and args[0].requires_grad:
                args[0].register_hook(lambda gradient: self.enter("backward, before the blocks"))

        def after(block: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            if block is blocks[-1]:
                self.enter("after the blocks")
            if out.requires_grad:
                out.register_hook(lambda gradient: self.enter(f"backward, {name_of(block)}"))

        for block in blocks:
            block.register_forward_pre_hook(before)
            block.register_forward_hook(after)

    def _count_storage(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.add(size)
        # Python says when the last tensor on this storage is gone, also inside autograd's graph.
        weakref.finalize(storage, self._count_freed, key, size)

    def add(self, size: int) -> None:
        """Count bytes that were allocated."""
        self.current += size
        self.peaks[self.moment] = max(self.peaks[self.moment], self.current)

    def _count_freed(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.current -= size


def measure(recipe: Recipe, config: ModelConfig, pack: PackShape, device: str) -> Footprint:
    """Return the footprint of the recipe's stage for such a pack on a device of this type ("cpu", "cuda")."""
    (low, low_peaks), (high, high_peaks) = (_run(recipe, config, pack, depth, device) for depth in DEPTHS)
    # Extend the line through both depths to the model's own.
    blocks = (config.decoder.depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])

    def extrapolate(low_value: float, high_value: float) -> float:
        return low_value + (high_value - low_value) * blocks

    return Footprint(
        activations=max(extrapolate(peak, high_peaks[moment]) for moment, peak in low_peaks.items()),
        logits=low.logits,
        tower_pass=low.tower_pass,
        flops=extrapolate(low.flops, high.flops),
        tower_flops=low.tower_flops,
    )


def _run(
    recipe: Recipe, config: ModelConfig, pack: PackShape, depth: int, device: str
) -> tuple[Footprint, dict[str, int]]:
    """Return the footprint of the stage with a decoder of `depth` blocks, and the peak of each moment."""
    shallow = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, depth=depth))
    rope = (shallow.decoder.head_dim, shallow.decoder.rope_theta, shallow.decoder.rope_scaling)
    # Fill the cache of this function with a real tensor: a fake one would stay there for later models.
    rope_inv_freq(*rope, torch.device("cpu"))
    # Drawing fake weights changes the state of torch's generator.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        model = fake_model(recipe, shallow, device)
        tower_pass, tower_flops = (
            _measure_tower(model, config, pack.tiles) if depth == DEPTHS[0] else (0.0, 0.0)
        )
        existing = [*model.parameters(), *model.buffers()]
        for parameter in model.parameters():
            # Every pack of a step but the first finds gradients, so they exist before the count starts.
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                existing.append(parameter.grad)
        with MemoryCounter(existing) as count:
            count.watch(list(model.decoder.blocks))
            loss = loss_of(model, recipe, config, pack)
            # A stage in which nothing before the loss learns has no graph to go back through.
            if loss.requires_grad:
                loss.backward()
    # The loss holds one chunk of logits twice: in fp32, and in the type of the vocabulary projection.
    itemsize = 2 if recipe.precision == "bf16" else 4
    footprint = Footprint(
        activations=count.peak,
        logits=min(CHUNK, pack.supervised) * config.decoder.vocab_size * (4 + itemsize),
        tower_pass=tower_pass,
        flops=count.flops,
        tower_flops=tower_flops,
    )
    return footprint, count.peaks


def fake_model(recipe: Recipe, config: ModelConfig, device: str) -> Llava:
    """Return the model as `prepare` sets it up for the stage, with fake weights."""
    with torch.device("meta"):
        model = Llava(config)
    # Blocks are counted as if all of their part learned: the decoders that run have other blocks.
    learn = {part.partition(".")[0] for part in recipe.stage.learn}
    learning = trainable_parameters(model, learn)
    state = {
        name: torch.empty(
            tensor.shape,
            dtype=memory_dtype(name, name in learning, recipe, device)
            if tensor.is_floating_point()
            else tensor.dtype,
        )
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    if recipe.stage.base != "none":
        # The count leaves weights out, so int8 stands for nf4 too.
        quantize_base(model.decoder, "int8")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)
    checkpoint_blocks(model.decoder.blocks, recipe.checkpointing)
    if "tower" in learn and isinstance(model.tower, ViT):
        checkpoint_blocks(model.tower.blocks, recipe.checkpointing)
    return model.train()


def loss_of(model: Llava, recipe: Recipe, config: ModelConfig, pack: PackShape) -> Tensor:
    """Run one pack forward, as the objective does, and return its loss."""
    tokens = pack.tokens
    ids = torch.zeros(1, tokens, dtype=torch.int64)  # kept to the end, as in a run
    learns = recipe.stage.learns("tower")
    bf16 = recipe.precision == "bf16"
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        image_tokens = None
        # A frozen tower's features come from outside the step; one that learns runs here, with a graph.
        if pack.tiles:
            with torch.set_grad_enabled(learns):
                features = model.for_connector(_features(model, config, pack.tiles, learns))
            image_tokens = model.connector(features).flatten(0, 1)[: pack.image_tokens]
        x = model.place(ids, image_tokens)
        attend = PackedAttention(pack.runs, config.decoder, x.device)
        rows = torch.zeros(pack.supervised, dtype=torch.int64)
        hidden = model.decoder(x, torch.zeros(1, tokens, dtype=torch.int64), attend, rows=rows)
        head, softcap = model.decoder.head_weight, config.decoder.logit_softcap
        return supervised_loss(hidden[0], head, rows, torch.ones(pack.supervised), softcap)


def _features(model: Llava, config: ModelConfig, tiles: int, learns: bool) -> Tensor:
    vision = config.vision
    dtype = next(model.tower.parameters()).dtype
    if learns:
        side = vision.image_size
        return model.features(torch.empty(tiles, 3, side, side, dtype=dtype))
    return torch.empty(tiles, vision.features, vision.width, dtype=dtype)


def _measure_tower(model: Llava, config: ModelConfig, tiles: int) -> tuple[float, float]:
    """Return (peak bytes of a call, FLOPs of one tile) of the frozen tower."""
    if config.vision.kind == "none" or not tiles:
        return 0.0, 0.0
    call_tiles = min(TILES_PER_CALL, tiles)
    side = config.vision.image_size
    with torch.no_grad(), MemoryCounter([*model.tower.parameters(), *model.tower.buffers()]) as count:
        model.features(torch.empty(call_tiles, 3, side, side))
    return float(count.peak), count.flops / call_tiles
