"""A run on several processes: torchrun starts them, DDP copies the model or FSDP shards it.

With one process no process group is made, and every method does nothing.

Every process must take part in every collective, or the run hangs. Four rules ensure it:
- Each process runs the same number of packs per step; dummy packs fill up.
- Each pack uses every part that learns; without images, the embeddings include the connector's output times
  zero.
- Gradients are reduced after the step's last pack (DDP), or after each (FSDP, whose processes would hold
  whole gradients until then).
- A decision that depends on one process (a signal, a sampled token) is shared before anyone acts on it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pumice.errors import InputError, counted
from pumice.train.recipe import Recipe

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Of a device's memory. Weights, gradients and optimiser states that need more are sharded.
MAX_COPY_SHARE = 0.6
# How long a process waits for the others: the first one may read, check and save for hours alone.
WAIT = datetime.timedelta(hours=12)


def needs_shards(model_states: float, memory: float) -> bool:
    """Return whether a copy of so many bytes leaves a GPU too little memory beside it."""
    return model_states > MAX_COPY_SHARE * memory


def check_shardable(recipe: Recipe) -> None:
    """Raise InputError if shards cannot hold what the recipe asks for."""
    if recipe.optimizer == "adamw8bit":
        raise InputError("optimizer: adamw8bit keeps its states whole; use parallel: ddp, or adamw")
    if recipe.stage.base == "nf4":
        raise InputError("base: nf4 cannot be sharded; use parallel: ddp, or base: int8")


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
        """Join the processes that torchrun started; without torchrun return a world of one process.

        Raises InputError when this machine has more processes than GPUs, or the recipe names one GPU for all.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
        on_gpu = torch.cuda.is_available() and (recipe.device or "cuda").startswith("cuda")
        if on_gpu:
            if recipe.device not in (None, "cuda"):
                raise InputError(
                    f"{recipe.name}: device: {recipe.device} is one GPU, torchrun started {size} processes; "
                    "say device: cuda, or leave it out"
                )
            here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1)), torch.cuda.device_count()
            if here > gpus:
                raise InputError(
                    f"{recipe.name}: {counted(here, 'process')} on this machine and "
                    f"{counted(gpus, 'GPU')}; start torchrun with "
                    f"--nproc-per-node {gpus}"
                )
            torch.cuda.set_device(local)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=WAIT)
        return cls(rank, size, local, "fsdp" if recipe.parallel == "fsdp" else "ddp")

    @property
    def main(self) -> bool:
        """Whether this is the first process, which writes files and talks to people."""
        return self.rank == 0

    def __enter__(self) -> World:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        """End the process group. error: by which this process ends, perhaps alone."""
        if self.size > 1:
            if error is not None and dist.get_backend() == "nccl":
                # NCCL ends a group only with all its members. They wait in the next step for this process,
                # whose error would never be told. Abort does not wait, and torchrun ends the others.
                abort = getattr(dist.group.WORLD, "abort", None)  # since PyTorch 2.7
                if abort is not None:
                    abort()
                return
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

    def choose_kind(self, recipe: Recipe, model_states: float, device: torch.device) -> None:
        """Decide `parallel: auto`, before anything is loaded: copies if they fit the device, else shards.

        model_states: bytes of weights, gradients and optimiser states of a copy. Raises InputError for shards
        with adamw8bit or nf4.
        """
        if self.size > 1 and recipe.parallel == "auto" and device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
            self.kind = "fsdp" if needs_shards(model_states, memory) else "ddp"
        if self.kind == "fsdp":
            check_shardable(recipe)

    @property
    def load_on(self) -> str | None:
        """Where `prepare` builds the model. Under FSDP one process reads it; the others get their shards."""
        if self.kind != "fsdp":
            return None
        return "cpu" if self.main else "meta"

    def share(self, module: nn.Module, device: torch.device) -> None:
        """Under FSDP, put a module on the device with the first process's values."""
        if self.kind != "fsdp":
            return

        def fetch(tensor: Tensor) -> Tensor:
            return self._from_first(tensor if self.main else None, tensor.shape, tensor.dtype, device)

        module._apply(fetch)

    def _from_first(
        self, tensor: Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return the first process's tensor on the device of each process."""
        here = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.to(device)
        here = here.contiguous()
        dist.broadcast(here.reshape(-1).view(torch.uint8), 0)  # bytes: gloo does not know every type
        return here

    def wrap(
        self,
        objective: nn.Module,
        blocks: Iterable[nn.Module],
        unsharded: Iterable[nn.Module],
        device: torch.device,
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
            from torch.distributed.device_mesh import init_device_mesh

            # FSDP moves a block's tensors to the device and keeps its shard. These stay where they are.
            values = {name: tensor.detach() for name, tensor in _named_tensors(objective)}
            shard(objective, blocks, unsharded, init_device_mesh(device.type, (self.size,)))
            self._fill(objective, values, device)
        return self._module

    @torch.no_grad()
    def _fill(self, objective: nn.Module, values: dict[str, Tensor], device: torch.device) -> None:
        """Give the tensors that have none yet their shard of the first process's values, one at a time."""
        missing = {name for name, tensor in values.items() if tensor.is_meta}
        names = sorted(set().union(*self.gather(missing)))
        objective._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
        tensors = dict(_named_tensors(objective))
        for name in names:
            value, tensor = values[name], tensors[name]
            whole = self._from_first(value if self.main else None, value.shape, value.dtype, device)
            placements = getattr(tensor, "placements", None)
            if placements is None:
                tensor.copy_(whole)
                continue
            parts = whole.chunk(self.size, placements[0].dim)
            if self.rank < len(parts):
                local(tensor).copy_(parts[self.rank])

    def accumulate(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Return the context of a pack, forward and backward; DDP reduces gradients in the last one only."""
        return self._module.no_sync() if self.kind == "ddp" and not last else contextlib.nullcontext()

    def sum(self, *values: float) -> list[float]:
        """Sum each value over all processes."""
        if self.size == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64, device=self._collective_device())
        dist.all_reduce(totals)
        return totals.tolist()

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            self.sum(0.0)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in order of rank; they must be small and picklable."""
        if self.size == 1:
            return [value]
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
        on_gpu = dist.get_backend() == "nccl"
        return torch.device("cuda", self.local) if on_gpu else torch.device("cpu")


def shard(
    objective: nn.Module, blocks: Iterable[nn.Module], unsharded: Iterable[nn.Module], mesh: DeviceMesh
) -> None:
    """Shard the objective's parameters over a mesh of processes (FSDP2); arguments as in `World.wrap`."""
    from torch.distributed.fsdp import fully_shard

    ignored = {parameter for module in unsharded for parameter in module.parameters()}
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(objective, mesh=mesh, ignored_params=ignored)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor; any other tensor unchanged."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
