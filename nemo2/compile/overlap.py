"""Hide the collectives of a block's backward behind the products that give weights' gradients.

A gradient of a weight is a result of the graph: nothing in it waits for one, and inductor computes
all of them last. Here they run between the starts of tensor-parallel sums and gathers and the waits
for their results. No number changes.
"""

from __future__ import annotations

from math import inf, prod
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering
from torch.fx import Graph, Node
from torch.utils._ordered_set import OrderedSet

from . import pipelined
from .pipelined import shape_of

_aten: Any = torch.ops.aten
_c10d: Any = torch.ops._c10d_functional
_WAIT = _c10d.wait_tensor.default
# Collective -> how often each byte of its larger side passes a link, about.
_PASSES = {
    _c10d.all_gather_into_tensor.default: 1,
    _c10d.reduce_scatter_tensor.default: 1,
    _c10d.all_to_all_single.default: 1,
    _c10d.all_reduce.default: 2,
}
_PRODUCTS = (_aten.mm.default, _aten.bmm.default, _aten.addmm.default)
# Operations of a product in the time of a byte: 500 TFLOP/s by 250 GB/s, of Hopper and its NVLink.
_OPERATIONS_A_BYTE = 2000.0


class Overlap(CustomGraphPass):
    """``hide_collectives`` as a pass of inductor.

    Args:
        group: what nothing hides of this group's collectives is joined to its products, by
            ``pipeline_collectives``; "" is none.
    """

    def __init__(self, group: str) -> None:
        self.group = group

    def __call__(self, graph: Graph) -> None:
        bare = hide_collectives(graph)
        if self.group:
            pipelined.pipeline_collectives(graph, bare, self.group)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, pipelined.__file__), self.group)


def hide_collectives(graph: Graph) -> list[Node]:
    """Let products that only results depend on run while collectives are on their way.

    Each collective gets of the products whose factors are known as many, oldest first, as take
    about as long as it; the last one all that are left. Their factors are kept until then.
    Returns the waits for those that get none.
    """
    waits = [n for n in graph.nodes if n.target == _WAIT and n.args[0].target in _PASSES]
    place = {node: i for i, node in enumerate(graph.nodes)}
    late = [found for n in graph.nodes if n.target in _PRODUCTS and (found := _only_for_results(n))]
    order: dict[Node, OrderedSet[Node]] = {}  # node -> what comes before it
    for wait in waits:
        start = wait.args[0]
        left = _operations_meanwhile(start) if wait is not waits[-1] else inf
        for nodes in [x for x in late if max(map(place.__getitem__, _given(x))) < place[start]]:
            if left <= 0:
                break
            late.remove(nodes)
            for node in nodes:
                wait.prepend(node)
            left -= _operations(nodes[0])
            order[nodes[0]] = OrderedSet([start])
            order.setdefault(wait, OrderedSet()).add(nodes[0])
    # The order of nodes alone is not kept: kernels are joined, and moved to save memory.
    preserve_node_ordering(graph, order)
    return [wait for wait in waits if wait not in order]


def _only_for_results(product: Node) -> list[Node]:
    """Return a product and what is made of it, if that is a result of the graph and no more."""
    found = [product]
    for node in found:
        for user in node.users:
            if user.op == "output" or user in found:
                continue
            if any(n not in found for n in user.all_input_nodes):
                return []
            found.append(user)
    return found


def _given(nodes: list[Node]) -> list[Node]:
    return [n for node in nodes for n in node.all_input_nodes if n not in nodes]


def _operations(product: Node) -> float:
    left, right = product.args[-2:]
    return 2.0 * prod(shape_of(left)) * shape_of(right)[-1]


def _operations_meanwhile(start: Node) -> float:
    """Return how many operations of a product take as long as a collective."""
    larger = max((start, start.args[0]), key=lambda node: prod(shape_of(node)))
    size = prod(shape_of(larger)) * larger.meta["val"].dtype.itemsize  # type: ignore[union-attr]
    return float(size) * _PASSES[start.target] * _OPERATIONS_A_BYTE
