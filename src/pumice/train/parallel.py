"""Many processes, one run: who they are, how the model is spread, what they agree on.

Knows `torch.distributed` and the objective's modules. Does not know data or files. With one process
nothing here does anything, and torch.distributed is not imported. Start several with torchrun.

Every process must take part in every collective. Four rules see to it: each runs the same number of packs
in a step (`dummy` packs fill up), each pack uses every part that learns (the objective adds a zero-weight
use of the connector where there is no picture), gradients meet once, after the step's last pack, and every
decision that depends on one process alone (a signal, a sampled token) is shared before it counts.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pumice.errors import InputError
from pumice.train.recipe import Recipe

COPIES = 0.6  # of a device's memory: what weights, gradients and optimiser may take before they are sharded


@dataclass
class World:
    """This process among `size`. `kind` says how the model is spread: single, ddp (copies) or fsdp."""

    rank: int = 0
    size: int = 1
    local: int = 0  # among the processes of this machine
    kind: str = "single"
    _module: Any = field(default=None, repr=False)

    @classmethod
    def join(cls, recipe: Recipe) -> World:
        """The world that torchrun made, or a world of one. InputError when its settings are incomplete."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        import torch.distributed as dist

        rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
        on_gpu = torch.cuda.is_available() and (recipe.device or "cuda").startswith("cuda")
        if on_gpu:
            torch.cuda.set_device(local)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if on_gpu else "gloo")
        return cls(rank, size, local, "fsdp" if recipe.parallel == "fsdp" else "ddp")

    @property
    def main(self) -> bool:
        return self.rank == 0

    def leave(self) -> None:
        if self.size > 1:
            import torch.distributed as dist

            if dist.get_backend() == "gloo":
                # Its thread may be letting go of the last step's tensors, for which it needs Python's lock.
                # Whoever ends the group waits for that thread: DDP, with the lock in its hands. Nothing tells
                # when the thread is through; a run hung so without this pause.
                time.sleep(0.1)
            self._module = None
            dist.destroy_process_group()

    def device(self, recipe: Recipe) -> str | None:
        """The recipe's device; of several GPUs the one that is this process's own."""
        if self.size > 1 and torch.cuda.is_available() and recipe.device in (None, "cuda"):
            return f"cuda:{self.local}"
        return recipe.device

    def choose(self, recipe: Recipe, model: nn.Module, device: torch.device) -> None:
        """Settle `parallel: auto`: copies where they fit the device, shards where they do not."""
        if self.size > 1 and recipe.parallel == "auto" and device.type == "cuda":
            held = sum(p.numel() * (16 if p.requires_grad else p.element_size()) for p in model.parameters())
            if held > COPIES * torch.cuda.get_device_properties(device).total_memory:
                self.kind = "fsdp"
        if self.kind == "fsdp" and recipe.optimizer == "adamw8bit":
            raise InputError("optimizer: adamw8bit keeps its states whole; use parallel: ddp, or adamw")

    def wrap(
        self, objective: nn.Module, blocks: Iterable[nn.Module], whole: Iterable[nn.Module]
    ) -> nn.Module:
        """The objective as this world runs it.

        blocks: modules that FSDP gathers one at a time. whole: modules that stay whole on every process
        because they are frozen and used a different number of times on each.
        """
        self._module = objective
        if self.kind == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            with warnings.catch_warnings():
                # PyTorch 2.13 wants another name for the first option, which those before do not know
                warnings.simplefilter("ignore", FutureWarning)
                self._module = DistributedDataParallel(
                    objective, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        elif self.kind == "fsdp":
            from torch.distributed.fsdp import fully_shard

            kept = {parameter for module in whole for parameter in module.parameters()}
            for block in blocks:
                fully_shard(block, ignored_params=kept)
            fully_shard(objective, ignored_params=kept)
        return self._module

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Around one pack's forward and backward pass: gradients travel after the last pack alone."""
        if self.kind == "ddp" and not last:
            with self._module.no_sync():
                yield
            return
        if self.kind == "fsdp":
            self._module.set_requires_gradient_sync(last)
        yield

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        if self.size == 1:
            return list(values)
        import torch.distributed as dist

        together = torch.tensor(values, dtype=torch.float64, device=self._collective_device())
        dist.all_reduce(together)
        return together.tolist()

    def broadcast(self, value: int) -> int:
        """Return the first process's value on every process."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        shared = torch.tensor(value, device=self._collective_device())
        dist.broadcast(shared, 0)
        return int(shared)

    def barrier(self) -> None:
        if self.size > 1:
            self.sum(0.0)

    def gather(self, value: Any) -> list[Any]:
        """Small plain values of every process, in order of rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def squares(self, tensors: Iterable[Tensor]) -> float:
        """Sum of squares of gradients, wherever their parts lie; every process gets the same."""
        norms = [torch.linalg.vector_norm(local(tensor)) for tensor in tensors]
        total = float(torch.stack(norms).square().sum()) if norms else 0.0
        return self.sum(total)[0] if self.kind == "fsdp" else total

    def full_state(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's whole tensors on the first process (elsewhere, under FSDP, nothing)."""
        if self.kind != "fsdp":
            return model.state_dict()
        from torch.distributed.tensor import DTensor

        state = {}
        for name, tensor in model.state_dict().items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.main:
                state[name] = whole.cpu()
        return state

    def _collective_device(self) -> torch.device:
        import torch.distributed as dist

        on_gpu = dist.get_backend() == "nccl"
        return torch.device("cuda", self.local) if on_gpu else torch.device("cpu")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
