"""nemo2: the plain model, ten annotations, and a mesh."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import nemo2

from ..case import Case, Step
from ..llama import Llama, fill, loss_of

RULES = {
    "layers": "pp",
    "embed.weight": ("tp", 0),
    "layers.*.attention.w[qkv].weight": ("tp", 0),
    "layers.*.attention.wo.weight": ("tp", 1),
    "layers.*.mlp.w[13].weight": ("tp", 0),
    "layers.*.mlp.w2.weight": ("tp", 1),
    "head.weight": ("tp", 0),
}


def build(case: Case) -> Step:
    with case.device:
        model = Llama(case.shape)
    fill(model)
    nemo2.annotate(model, RULES)
    mesh = nemo2.make_mesh(**dict(case.sizes.items()), device=case.device.type)
    parallel = nemo2.parallelize(
        model,
        mesh,
        data_parallel=nemo2.DataParallel(reshard=case.reshard),
        context_parallel=case.context,
        pipeline=nemo2.Pipeline(case.microbatches, case.schedule, case.virtual_stages),
        precision="bf16" if case.dtype == torch.bfloat16 else None,
        compile=nemo2.Compile(async_tp=case.async_tp) if case.compile else False,
        inplace=True,
    )
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=case.lr, fused=True)

    def loss_fn(model: nn.Module, ids: Tensor) -> Tensor:
        return loss_of(model(ids[:, :-1]), ids[:, 1:])

    def step(ids: Tensor) -> Tensor:
        loss = parallel.backward(loss_fn, case.part(ids, mesh.get_local_rank("dp")))
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step
