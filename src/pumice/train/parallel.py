"""A run on several processes: torchrun starts them, DDP copies the model or FSDP shards it.

With one process torch.distributed is not imported, and every method does nothing.

Every process must take part in every collective, or the run hangs. Four rules ensure it:
- Each process runs the same number of packs per step; dummy packs fill up.
- Each pack uses every part that learns; without images the objective adds the connector's output times zero.
- Gradients are reduced once, after the step's last pack.
- A decision that depends on one process (a signal, a sampled token) is shared before anyone acts on it.
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

MAX_COPY_SHARE = (
    0.6  # of a device's memory; weights, gradients and optimiser states that need more are sharded
)


@dataclass
class World:
    """This process among `size`. kind: single, ddp (copies of the model) or fsdp (shards)."""

    rank: int = 0
    size: int = 1
    local: int = 0  # among the processes of this machine
    kind: str = "single"
    _module: Any = field(default=None, repr=False)

    @classmethod
    def join(cls, recipe: Recipe) -> World:
        """Join the processes that torchrun started; without torchrun return a world of one process."""
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
        """Whether this is the first process, which writes files and talks to people."""
        return self.rank == 0

    def leave(self) -> None:
        """End the process group."""
        if self.size > 1:
            import torch.distributed as dist

            if dist.get_backend() == "gloo":
                # Gloo's thread may still free the last step's tensors, which needs Python's global lock.
                # DDP holds that lock when it ends the group and waits for the thread: a deadlock, seen once.
                # There is no event to wait for, so give the thread time.
                time.sleep(0.1)
            self._module = None
            dist.destroy_process_group()

    def device(self, recipe: Recipe) -> str | None:
        """Return the recipe's device; with several GPUs the one of this process."""
        if self.size > 1 and torch.cuda.is_available() and recipe.device in (None, "cuda"):
            return f"cuda:{self.local}"
        return recipe.device

    def choose_kind(self, recipe: Recipe, model: nn.Module, device: torch.device) -> None:
        """Decide `parallel: auto`: copies if they fit the device, else shards.

        Raises InputError for shards with adamw8bit.
        """
        if self.size > 1 and recipe.parallel == "auto" and device.type == "cuda":
            # A trainable parameter takes 16 bytes: fp32 weight, gradient, and two AdamW moments.
            needed = sum(
                p.numel() * (16 if p.requires_grad else p.element_size()) for p in model.parameters()
            )
            if needed > MAX_COPY_SHARE * torch.cuda.get_device_properties(device).total_memory:
                self.kind = "fsdp"
        if self.kind == "fsdp" and recipe.optimizer == "adamw8bit":
            raise InputError("optimizer: adamw8bit keeps its states whole; use parallel: ddp, or adamw")

    def wrap(
        self, objective: nn.Module, blocks: Iterable[nn.Module], unsharded: Iterable[nn.Module]
    ) -> nn.Module:
        """Wrap the objective for DDP or FSDP; return it unchanged for one process.

        blocks: modules that FSDP gathers one at a time. unsharded: frozen modules that every process keeps
        whole, because processes call them a different number of times.
        """
        self._module = objective
        if self.kind == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            with warnings.catch_warnings():
                # PyTorch 2.13 renamed the first option; earlier versions do not know the new name.
                warnings.simplefilter("ignore", FutureWarning)
                self._module = DistributedDataParallel(
                    objective, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        elif self.kind == "fsdp":
            from torch.distributed.fsdp import fully_shard

            ignored = {parameter for module in unsharded for parameter in module.parameters()}
            for block in blocks:
                fully_shard(block, ignored_params=ignored)
            fully_shard(objective, ignored_params=ignored)
        return self._module

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Wrap one pack's forward and backward pass; gradients are reduced after the last pack only."""
        if self.kind == "ddp" and not last:
            with self._module.no_sync():
                yield
            return
        if self.kind == "fsdp":
            self._module.set_requires_gradient_sync(last)
        yield

    def sum(self, *values: float) -> list[float]:
        """Sum each value over all processes."""
        if self.size == 1:
            return list(values)
        import torch.distributed as dist

        totals = torch.tensor(values, dtype=torch.float64, device=self._collective_device())
        dist.all_reduce(totals)
        return totals.tolist()

    def broadcast(self, value: int) -> int:
        """Return the first process's value on every process."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        shared = torch.tensor(value, device=self._collective_device())
        dist.broadcast(shared, 0)
        return int(shared)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            self.sum(0.0)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in order of rank; they must be small and picklable."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum_of_squares(self, tensors: Iterable[Tensor]) -> float:
        """Return the sum of squares of gradients, shards included; the same on every process."""
        norms = [torch.linalg.vector_norm(local(tensor)) for tensor in tensors]
        total = float(torch.stack(norms).square().sum()) if norms else 0.0
        return self.sum(total)[0] if self.kind == "fsdp" else total

    def full_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the model's tensors, gathered on the first process under FSDP; the others get none."""
        if self.kind != "fsdp":
            return model.state_dict()
        from torch.distributed.tensor import DTensor

        state = {}
        for name, tensor in model.state_dict().items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.main:
                state[name] = full.cpu()
        return state

    def _collective_device(self) -> torch.device:
        import torch.distributed as dist

        on_gpu = dist.get_backend() == "nccl"
        return torch.device("cuda", self.local) if on_gpu else torch.device("cpu")


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor; any other tensor unchanged."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
