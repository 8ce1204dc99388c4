"""``make_mesh``: from axis sizes to a torch DeviceMesh, with or without a launcher."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from nemo2.errors import MeshError
from nemo2.mesh.sizes import AXES, fit_sizes

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def make_mesh(
    *, dp: int = 1, pp: int = 1, cp: int = 1, tp: int = 1, device: str | torch.device | None = None
) -> DeviceMesh:
    """Return a DeviceMesh with axes pp, dp, cp, tp (outermost to innermost) over all ranks.

    Starts the default process group if there is none: from a launcher's environment (torchrun),
    else of this process alone. On CUDA it also selects this process's device.

    Args:
        dp: data-parallel degree. One of the four may be -1: what is left of the world.
        pp: pipeline degree, the number of groups of stages.
        cp: context-parallel degree.
        tp: tensor-parallel degree.
        device: "cpu" or "cuda"; by default CUDA where there is a GPU.

    Returns:
        a mesh of shape (pp, dp, cp, tp); all four axes exist, those of size 1 included.

    Communication: making the groups of each axis; collective, all ranks must call it.
    Raises: MeshError, before any communication, if the sizes do not multiply to the world size.
    """
    kind = _device_type(device)
    world_size = _world_size()
    sizes = fit_sizes({"pp": pp, "dp": dp, "cp": cp, "tp": tp}, world_size)
    if kind == "cuda":
        _select_gpu()
    if not dist.is_initialized():
        _start_process_group(kind, world_size)
    shape = tuple(size for _, size in sizes.items())
    return init_device_mesh(kind, shape, mesh_dim_names=AXES)


def restart() -> int:
    """Return how often torchrun has restarted this process's group of workers."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def store_of_restart() -> Store | None:
    """Return the store from which a restarted process starts its group; None in a first start.

    torchrun's store outlives its workers. In it are the addresses of those that died, which ranks
    find in place of the new ones (torch 2.13): "Connection refused", or an endless wait.
    """
    if not restart():
        return None
    store, _, _ = next(rendezvous("env://"))
    return PrefixStore(f"nemo2/restart{restart()}", store)


def _device_type(device: str | torch.device | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise MeshError(f"a mesh lives on 'cpu' or 'cuda', got device={device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise MeshError("device='cuda', but torch sees no GPU here; device='cpu' works")
    return kind


def _world_size() -> int:
    if dist.is_initialized():
        return dist.get_world_size()
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit() or int(text) < 1:
        raise MeshError(f"the environment says WORLD_SIZE={text!r}, which is no number of ranks")
    missing = [name for name in LAUNCHER if name not in os.environ]
    if int(text) > 1 and missing:
        raise MeshError(
            f"the environment says WORLD_SIZE={text} but not {', '.join(missing)}; start with "
            f"torchrun --nproc-per-node {text} <your script>, or call init_process_group first"
        )
    return int(text)


def _start_process_group(kind: str, world_size: int) -> None:
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if all(name in os.environ for name in LAUNCHER):
        rank = int(os.environ["RANK"])
        store = store_of_restart()
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=world_size)


def _select_gpu() -> None:
    """Select the GPU of this process's LOCAL_RANK; without one, leave the current device."""
    local, count = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    if local is None or count == 1:  # a launcher may show each process its own GPU only
        return
    if int(local) >= count:
        raise MeshError(
            f"local rank {local} has no GPU: this host shows {count}; start at most {count} "
            "processes here, or use device='cpu'"
        )
    torch.cuda.set_device(int(local))
