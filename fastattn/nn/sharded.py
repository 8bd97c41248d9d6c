"""Tensor parallelism by torch's plans (ColwiseParallel, RowwiseParallel, SequenceParallel). They
make weights DTensors, of which each process holds a shard, and outputs may be DTensors too. Kernels
run on the local shard. docs/pipelines.md has an example of a plan.

torch.distributed is imported only where a DTensor occurs, because importing it is slow.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import checks


def is_sharded(x) -> bool:
    """Is it a DTensor?"""
    return type(x).__name__ == "DTensor"


def mesh_of(module: nn.Module):
    """The DeviceMesh of the module's weight; None where the weight is a plain tensor. Call it only
    within forward(): outside, the weights of FSDP2 are DTensors too."""
    weight = getattr(module, "weight", None)
    return weight.device_mesh if is_sharded(weight) else None


def local(name: str, x: Tensor) -> Tensor:
    """This process's shard of the output x [..., heads * head_dim] of the projection `name`."""
    if not is_sharded(x):
        return x
    from torch.distributed.tensor import Replicate, Shard

    if any(p not in (Replicate(), Shard(x.dim() - 1), Shard(-1)) for p in x.placements):
        raise ValueError(
            f"{name} gives a DTensor with the placements {list(x.placements)}; accepted are "
            "Shard(-1), as ColwiseParallel gives it, and Replicate()"
        )
    return x.to_local()


def whole(x: Tensor) -> Tensor:
    """The whole weight, on every process."""
    return x.full_tensor() if is_sharded(x) else x


def own_part(x: Tensor, mesh) -> Tensor:
    """This process's part along dimension 0 of x [n, ...], of which every process has a copy. The
    gradient of x has the parts of all processes."""
    from torch.distributed.tensor import Shard

    return _replicated(x, mesh).redistribute(placements=[Shard(0)] * mesh.ndim).to_local()


def call_shared(module: nn.Module, x: Tensor, mesh) -> Tensor:
    """module(x), where x differs between processes. Parameters that every process has a copy of get
    the gradients summed over all processes; otherwise the copies would drift apart."""
    from torch.distributed.tensor import Partial

    shared = {
        name: _replicated(p, mesh).to_local(grad_placements=[Partial()] * mesh.ndim)
        for name, p in module.named_parameters()
        if not is_sharded(p)
    }
    return torch.func.functional_call(module, shared, (x,))


def _replicated(x: Tensor, mesh) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    if is_sharded(x):
        return x
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)


def alike(added: Tensor, x: Tensor) -> Tensor:
    """`added` as a DTensor where x is one, and as a plain tensor where x is one. A plan may make
    only one of the two a DTensor."""
    if is_sharded(added) == is_sharded(x):
        return added
    from torch.distributed.tensor import DTensor, Replicate

    if is_sharded(added):
        summed = [Replicate() if p.is_partial() else p for p in added.placements]
        return added.redistribute(placements=summed).to_local()
    return DTensor.from_local(added, x.device_mesh, x.placements, run_check=False)


def own_key(mesh, device: torch.device) -> Tensor:
    """A dropout key that differs between processes, because each has other rows of a sharded
    sequence. All processes draw all keys, so that their generators stay in step."""
    keys = torch.randint(0, 2**63 - 1, (mesh.size(), 2), dtype=torch.int64, device=device)
    return checks.dropout_key(keys[mesh.get_local_rank()], device)
