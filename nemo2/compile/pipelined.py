"""Tensor-parallel collectives of a compiled block, each in one operator with its products.

A rank multiplies the rows that it has while others come from its peers' memory, and sends the rows
of a product that are done while it computes the next. torch has the operators (``symm_mem``), for
GPUs that can read each other's memory; here the collectives and products of a graph become theirs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

_aten: Any = torch.ops.aten
_c10d: Any = torch.ops._c10d_functional
_symmetric: Any = torch.ops.symm_mem

_GATHER = _c10d.all_gather_into_tensor.default
_SUM = _c10d.reduce_scatter_tensor.default
_MM, _ADDMM = _aten.mm.default, _aten.addmm.default
_RESHAPES = (_aten.reshape.default, _aten.view.default)
_CLONES = (_aten.clone.default,)


def pipeline_collectives(graph: Graph, waits: Iterable[Node], group: str) -> None:
    """Replace the collectives that ``waits`` wait for, where nothing but a product stands beside.

    Args:
        waits: ``wait_tensor`` nodes of gathers and sums over ranks; others are left as they are.
        group: the name of the one whose collectives are replaced.
    """
    for wait in waits:
        start: Any = wait.args[0]
        if start.args[-1] != group:
            continue
        if start.target == _GATHER and len(start.users) == 1:
            _gather_and_multiply(graph, wait, start)
        elif start.target == _SUM and len(start.users) == 1 and start.args[1] == "sum":
            _multiply_and_scatter(graph, wait, start)


def _gather_and_multiply(graph: Graph, wait: Node, start: Node) -> None:
    """Replace a gather of (s / n, ..., w) along s, and products of its rows with weights."""
    shard: Any = start.args[0]
    if len(shape_of(shard)) < 2:
        return
    matrices = dict(_matrices(wait))
    products = [p for rows in matrices for p in rows.users if p.target in (_MM, _ADDMM)]
    products = [p for p in products if p.args[-2] in matrices and not p.kwargs]  # alpha, beta
    with graph.inserting_before(start):
        weights = {p: w for p in products if (w := _again(graph, p.args[-1])) is not None}
        if not weights:
            return
        call = (shard, [*weights.values()], 0, start.args[2])
        made = _add(graph, _symmetric.fused_all_gather_matmul.default, *call)
        results = _add(graph, operator.getitem, made, 1)
        whole = _add(graph, operator.getitem, made, 0)
        outs = [_add(graph, operator.getitem, results, i) for i in range(len(weights))]
    for out, product in zip(outs, weights, strict=True):
        with graph.inserting_before(product):
            order = matrices[product.args[-2]]  # type: ignore[index]
            rows = _add(graph, _aten.permute.default, out, order) if order else out
            rows = _add(graph, _aten.reshape.default, rows, list(shape_of(product)))
            if product.target == _ADDMM:
                rows = _add(graph, _aten.add.Tensor, rows, product.args[0])
        product.replace_all_uses_with(rows)
        graph.erase_node(product)
    wait.replace_all_uses_with(whole)
    graph.erase_node(wait)
    graph.erase_node(start)


def _multiply_and_scatter(graph: Graph, wait: Node, start: Node) -> None:
    """Replace a product, and the sum over ranks of which each keeps its part of the first dim."""
    terms: Any = start.args[0]
    chain, order = [terms], None
    while chain[-1].target in _CLONES:
        chain.append(chain[-1].args[0])
    if chain[-1].target == _aten.permute.default:
        order = list(chain[-1].args[1])
        chain.append(chain[-1].args[0])
    shape = shape_of(chain[-1])  # of what the product's rows stand for
    if chain[-1].target in _RESHAPES:
        chain.append(chain[-1].args[0])
    product = chain[-1]
    if product.target != _MM or shape_of(product) != (prod(shape[:-1]), shape[-1]):
        return
    if any(len(n.users) > 1 for n in chain) or (order and order[-1] != len(order) - 1):
        return
    left, right = product.args
    with graph.inserting_before(wait):
        left = _add(graph, _aten.reshape.default, left, [*shape[:-1], shape_of(left)[-1]])
        left = _add(graph, _aten.permute.default, left, order) if order else left
        call = (left, right, "sum", 0, start.args[3])
        made = _add(graph, _symmetric.fused_matmul_reduce_scatter.default, *call)
    wait.replace_all_uses_with(made)
    for node in (wait, start, *chain):
        graph.erase_node(node)


def _matrices(wait: Node) -> Iterator[tuple[Node, list[int] | None]]:
    """Yield the matrices of rows of what was gathered, and how its dims were ordered before."""
    found: list[tuple[Node, list[int] | None]] = [(wait, None)]
    if len(shape_of(wait)) == 2:
        yield wait, None
    for node, order in found:
        *batch, width = shape_of(node)
        for user in node.users:
            if user.target in _RESHAPES:
                if shape_of(user) == (prod(batch), width):
                    yield user, order
            elif user.target in _CLONES:
                found.append((user, order))
            elif user.target == _aten.permute.default and order is None:
                moved: Any = user.args[1]
                if moved[-1] == len(moved) - 1:
                    found.append((user, list(moved)))


def _again(graph: Graph, weight: Any) -> Any:
    """Return ``weight`` made once more here, if it is an input of the graph, moved or cast."""
    if weight.op == "placeholder":
        return weight
    kinds = (*_RESHAPES, _aten.permute.default, torch.ops.prims.convert_element_type.default)
    if weight.target not in kinds:
        return None
    made = _again(graph, weight.args[0])
    return made and _add(graph, weight.target, made, *weight.args[1:])


def _add(graph: Graph, target: Any, *args: Any) -> Node:
    """Return a new node with the value that it has on stand-ins."""
    node = graph.call_function(target, args)
    values = map_arg(args, lambda n: n.meta["val"])
    node.meta["val"] = target(*values)
    return node


def shape_of(node: Any) -> tuple[int, ...]:
    """Return the shape of the value of a node of a graph."""
    return tuple(node.meta["val"].shape)
