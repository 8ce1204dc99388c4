"""What a compiled block keeps for its backward under ``remat="selective"``."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

_aten: Any = torch.ops.aten
_c10d: Any = torch.ops._c10d_functional
_PRODUCTS = (_aten.mm.default, _aten.addmm.default)
_SUMS = (_c10d.all_reduce.default, _c10d.reduce_scatter_tensor.default)


def mark(graph: Graph) -> None:
    """Tag a joint graph: products with weights and their sums are kept, all else is computed again.

    Of a product that is summed over ranks the sum alone is kept.
    """
    backward = _backward_nodes(graph)
    for node in graph.nodes:
        if node.op == "call_function" and node not in backward:
            keep = _is_sum(node) or (node.target in _PRODUCTS and not _only_summed(node))
            policy = CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
            node.meta["recompute"] = policy
            node.meta["ac_graph_id"] = 0


def _backward_nodes(graph: Graph) -> set[Node]:
    """Return what depends on the gradients of the results."""
    found: set[Node] = set()
    for node in graph.nodes:
        given = node.op == "placeholder" and "tangents" in str(node.target)
        if given or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _is_sum(node: Node) -> bool:
    waits = node.target == _c10d.wait_tensor.default
    return waits and any(n.target in _SUMS for n in node.all_input_nodes)


_VIEWS = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)


def _only_summed(node: Node) -> bool:
    """Say whether a product is used for nothing but its sum over ranks."""
    users = list(node.users)
    while users and all(u.target in _VIEWS for u in users):
        users = [v for u in users for v in u.users]
    return bool(users) and all(u.target in _SUMS for u in users)


class Selective(CustomGraphPass):
    """``mark`` as a pass of inductor."""

    def __call__(self, graph: Graph) -> None:
        mark(graph)

    def uuid(self) -> Any:
        return "nemo2-selective-1"


def partitioned(module: GraphModule, inputs: Any, **kwargs: Any) -> Any:
    """Split a joint graph into forward and backward by these tags."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    mark(module.graph)
    return min_cut_rematerialization_partition(module, inputs, **kwargs)
