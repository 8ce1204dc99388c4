"""Hide the collectives of tensor parallelism behind the matrix products of a compiled block.

In the graph of a block a gather is followed by the products that use its result, and a sum over
ranks follows the product that makes its terms. Both are replaced by torch's pipelined operators,
in which a rank multiplies what it has while the rest comes from its peers' memory. The sums of a
backward follow several products whose gradients are added: they run while the gradients of
weights, which nothing waits for, are computed. What is moved stays the same, byte by byte.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

_aten: Any = torch.ops.aten
_c10d: Any = torch.ops._c10d_functional
_symmetric: Any = torch.ops.symm_mem

_GATHER = _c10d.all_gather_into_tensor.default
_SUM = _c10d.reduce_scatter_tensor.default
_WAIT = _c10d.wait_tensor.default
_MM = _aten.mm.default
_VIEWS = (_aten.view.default, _aten.reshape.default, _aten.permute.default, _aten.clone.default)
_CASTS = (torch.ops.prims.convert_element_type.default,)


class Overlap(CustomGraphPass):
    """Both rewrites, as a pass of inductor."""

    def __call__(self, graph: Graph) -> None:
        import os

        if "fuse" in os.environ["NEMO2_OVERLAP"]:
            fuse(graph)
        delay_weights(graph)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,), __import__("os").environ["NEMO2_OVERLAP"])


def fuse(graph: Graph) -> None:
    """Replace gathers with their products, and products with their sums, by one operator each.

    Where rows are split: the first dim that is larger than one, of matrices once that is left out.
    """
    for wait in [n for n in graph.nodes if n.target == _WAIT]:
        if wait.args[0].target == _GATHER:
            _fuse_gather(graph, wait)
        elif wait.args[0].target == _SUM:
            _fuse_sum(graph, wait)


def _fuse_gather(graph: Graph, wait: Node) -> None:
    gather: Any = wait.args[0]
    shard, _, group = gather.args
    rows = wait
    while len(rows.users) == 1 and _same_matrix(after := next(iter(rows.users))):
        rows = after
    matrix = _matrix(shard)
    if matrix is None or _shape(shard)[0] != matrix[0] or len(gather.users) > 1:
        return
    if len(_shape(rows)) != 2 or _shape(rows)[1] != matrix[1]:
        return
    with graph.inserting_before(gather):
        products = {}
        for user in rows.users:
            if user.target == _MM and user.args[0] is rows:
                weight = _again(graph, user.args[1])
                if weight is not None:
                    products[user] = weight
        if not products:
            return
        flat = graph.call_function(_aten.reshape.default, (shard, list(matrix)))
        made = graph.call_function(
            _symmetric.fused_all_gather_matmul.default, (flat, [*products.values()], 0, group)
        )
        whole = graph.call_function(operator.getitem, (made, 0))
        results = graph.call_function(operator.getitem, (made, 1))
        outs = [graph.call_function(operator.getitem, (results, i)) for i in range(len(products))]
    for product, out in zip(products, outs, strict=True):
        product.replace_all_uses_with(out)
    rows.replace_all_uses_with(whole)
    for product in products:
        graph.erase_node(product)
    _erase(graph, rows, shard)


def _fuse_sum(graph: Graph, wait: Node) -> None:
    total: Any = wait.args[0]
    terms, kind, _, group = total.args
    while len(terms.users) == 1 and terms.target in _VIEWS and _same_matrix(terms):
        terms = terms.args[0]
    if terms.target != _MM or len(terms.users) > 1 or len(total.users) > 1:
        return
    if _matrix(total.args[0]) != _shape(terms) or _shape(total.args[0])[0] != _shape(terms)[0]:
        return
    with graph.inserting_before(wait):
        made = graph.call_function(
            _symmetric.fused_matmul_reduce_scatter.default, (*terms.args, kind, 0, group)
        )
        out = graph.call_function(_aten.reshape.default, (made, list(_shape(wait))))
    wait.replace_all_uses_with(out)
    _erase(graph, wait, terms.args[0])


def delay_weights(graph: Graph) -> None:
    """Let products that only results of the graph depend on run while a sum is on its way."""
    since: list[Node] = []
    for node in list(graph.nodes):
        if node.target == _MM:
            since.append(node)
        if node.target != _SUM or len(node.users) != 1:
            continue
        wait = next(iter(node.users))
        for product in since:
            for late in _leads_nowhere(product):
                wait.prepend(late)
        since = []


def _erase(graph: Graph, last: Node, first: Any) -> None:
    """Erase a chain of nodes that are not used any more, ``last`` to what ``first`` went into.

    Dead code is not found by itself: a wait has an effect.
    """
    while last is not first and not last.users:
        before: Any = last.args[0]
        graph.erase_node(last)
        last = before


def _leads_nowhere(product: Node) -> list[Node]:
    """Return a product and what is made of it, if that is a result of the graph and no more."""
    found = [product]
    for node in found:
        for user in node.users:
            if user.op == "output" or user in found:
                continue
            if user.target not in (*_VIEWS, *_CASTS) or len(found) > 4:
                return []
            found.append(user)
    return found


def _again(graph: Graph, weight: Any) -> Node | None:
    """Return ``weight`` made once more here, if it is an input of the graph, viewed or cast."""
    if weight.op == "placeholder":
        return weight
    if weight.target not in (*_VIEWS, *_CASTS):
        return None
    made = _again(graph, weight.args[0])
    return made and graph.node_copy(weight, lambda n: made if n is weight.args[0] else n)


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _matrix(node: Node) -> tuple[int, ...] | None:
    """Return the shape of what is a matrix but for dims of size one."""
    sizes = tuple(n for n in _shape(node) if n != 1)
    return sizes if len(sizes) == 2 else None


def _same_matrix(node: Node) -> bool:
    """Say whether ``node`` only adds, drops or moves dims of size one of a matrix."""
    if node.target not in _VIEWS or _matrix(node) is None:
        return False
    before: Any = node.args[0]
    if node.target == _aten.permute.default:
        kept = [d for d in node.args[1] if _shape(before)[d] != 1]  # type: ignore[union-attr]
        return kept == sorted(kept)
    return _matrix(node) == _matrix(before)
