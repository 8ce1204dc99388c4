"""From a rehearsed block to compiled code: one graph, handed to a backend of ``torch.compile``.

The block's Python is run by AOTAutograd, which records forward and backward together; Dynamo is not
needed, as the path is known. The backend then sees what it always sees. Graphs that are alike, as
those of a model's blocks are, are compiled once: inductor finds the code of the first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from ..pytree import tree_leaves
from ..sharding.tracing import Tracing, tracing
from .rehearse import Rehearsal, stand_ins


@dataclass(frozen=True)
class Compiler:
    """What makes code of a block's graph.

    Attributes:
        backend: ``"inductor"`` or ``"aot_eager"``.
        selective: keep only matrix products and sums for backward (``remat="selective"``).
        pipelined: the name of the group whose collectives are joined to products, or "".
    """

    backend: str
    selective: bool
    pipelined: str

    def __call__(self, module: GraphModule, inputs: Sequence[Tensor]) -> Any:
        """Return the code of a graph that calls a block, compiled forward and backward."""
        make = self._inductor if self.backend == "inductor" else self._aot_eager
        return make(module, inputs)

    def _aot_eager(self, module: GraphModule, inputs: Sequence[Tensor]) -> Any:
        from torch._dynamo.backends.common import aot_autograd
        from torch._dynamo.backends.debugging import aot_eager, boxed_nop

        from .remat import partitioned

        if not self.selective:
            return aot_eager(module, list(inputs))
        made: Callable[..., Any] = aot_autograd(
            fw_compiler=boxed_nop,
            bw_compiler=boxed_nop,
            partition_fn=partitioned,
            keep_inference_input_mutations=True,
        )
        return made(module, list(inputs))

    def _inductor(self, module: GraphModule, inputs: Sequence[Tensor]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        from .overlap import Overlap
        from .remat import Selective

        options: dict[str, Any] = {"post_grad_custom_post_pass": Overlap(self.pipelined)}
        if self.selective:
            options["joint_custom_pre_pass"] = Selective()
        return compile_fx(module, inputs, config_patches=options)


def compiled_function(
    rehearsal: Rehearsal,
    forward: Callable[[Sequence[Any]], Any],
    leaves: Sequence[Any],
    held: Sequence[Tensor],
    compiler: Compiler,
) -> Callable[..., Sequence[Any]]:
    """Return a function of the tensors among ``leaves``, dropout's keys if any, and ``held``.

    It returns the tensors of the block's result, and can be differentiated.
    """
    from torch._functorch import config as aot_config

    given = [leaves[i] for i in rehearsal.tensors]
    if rehearsal.sites:
        device = (given or list(held))[0].device
        given.append(torch.zeros((len(rehearsal.sites), 3), dtype=torch.int64, device=device))
    inputs = stand_ins(rehearsal.mode, [*given, *held])
    unique: dict[int, Tensor] = {id(x): x for x in inputs}
    order = [list(unique).index(id(x)) for x in inputs]
    shift = 1 if rehearsal.sites else 0  # dropout's keys come after the arguments
    places = [i + shift if i >= len(rehearsal.tensors) else i for i in rehearsal.written]
    written = sorted({order[i] for i in places})

    def body(*distinct: Tensor) -> tuple[Tensor, ...]:
        inside = [x.clone() if i in written else x for i, x in enumerate(distinct)]
        values = [inside[i] for i in order]
        filled = list(leaves)
        for i, x in zip(rehearsal.tensors, values, strict=False):
            filled[i] = x
        keys = values[len(rehearsal.tensors)] if rehearsal.sites else None
        with rehearsal.staged(Tracing(keys), values[len(given) :]):
            flat = tree_leaves(forward(filled))
        return (*(x for x in flat if isinstance(x, Tensor)), *(inside[i] for i in written))

    module = _as_graph(body, len(unique), len(rehearsal.outputs) + len(written))
    # The outer graph has one node; what it calls is not in AOTAutograd's key of a cache.
    with aot_config.patch(enable_autograd_cache=False), tracing(Tracing()):  # backward, too
        run = compiler(module, list(unique.values()))
    first = [order.index(i) for i in range(len(unique))]

    def call(*tensors: Tensor) -> Sequence[Any]:
        out: Sequence[Any] = run(*[tensors[i] for i in first])
        return out

    def writing(*tensors: Tensor) -> Sequence[Any]:
        """Give copies of what is written into, which backward may read, and write afterwards."""
        given = [tensors[i] for i in first]
        out = run(*[x.clone() if i in written else x for i, x in enumerate(given)])
        with torch.no_grad():
            for i, value in zip(written, out[-len(written) :], strict=True):
                given[i].copy_(value)
        results: Sequence[Any] = out[: -len(written)]
        return results

    if written:
        return writing
    return call if len(first) < len(inputs) else run


class _Body(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *tensors: Tensor) -> Any:
        return self.run(*tensors)


def _as_graph(run: Callable[..., Any], inputs: int, outputs: int) -> GraphModule:
    """Return a graph of one call, which is what backends take."""
    graph = Graph()
    given = tuple(graph.placeholder(f"x{i}") for i in range(inputs))
    root = nn.Module()
    root.body = _Body(run)
    made = graph.call_module("body", given)
    graph.output(tuple(graph.call_function(operator.getitem, (made, i)) for i in range(outputs)))
    return GraphModule(root, graph)
