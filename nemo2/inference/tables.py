"""Embedding tables that ids and positions are looked up in: what is beyond them is refused.

On a mesh only the first stage would find out, and the others would wait for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import Nemo2Error
from ..pipeline.absent import is_absent
from ..sharding.modes import suspended
from .request import Request


@dataclass(frozen=True)
class Table:
    """One embedding: its name and rows, and what is looked up in it.

    ``offset``: what is added to positions; None for ids.
    """

    name: str
    rows: int
    offset: int | None

    def check(self, request: Request) -> None:
        """Raise Nemo2Error when the request goes beyond the table."""
        if self.offset is None and request.largest >= self.rows:
            worst = next(i for i, p in enumerate(request.prompts) if max(p) >= self.rows)
            raise Nemo2Error(
                f"generate: prompt {worst} has the id {max(request.prompts[worst])}, and"
                f" '{self.name}' has {self.rows} rows: ids from 0 to {self.rows - 1}"
            )
        if self.offset is not None and request.longest + request.new - 1 + self.offset > self.rows:
            fits = self.rows - self.offset - request.longest + 1
            options = [f"max_new_tokens={fits}"] if fits > 0 else []
            raise Nemo2Error(
                f"generate: the longest prompt has {request.longest} tokens and max_new_tokens is"
                f" {request.new}, but '{self.name}' has {self.rows - self.offset} positions\n"
                "  options: " + " | ".join([*options, "shorter prompts"])
            )


_POSITIONS = re.compile(r"pos|wpe", re.IGNORECASE)

# Module and kind of call -> its tables, found in the first call.
_found: MutableMapping[nn.Module, dict[Any, tuple[Table, ...]]] = WeakIdKeyDictionary()


@contextmanager
def checking_tables(
    module: nn.Module, kind: Any, request: Request, part: Mapping[str, Any]
) -> Iterator[None]:
    """Check the request against the model's tables; the first time while its first step runs.

    That step is planned before it runs, the same on all ranks, so all of them raise.
    """
    known = _found.setdefault(module, {})
    if kind in known:
        for table in known[kind]:
            table.check(request)
        yield
        return
    found: dict[str, Table] = {}
    open_questions: list[str] = []

    def look(name: str, embedding: nn.Embedding, index: Any) -> None:
        offset = _looked_up(name, index, part)
        if offset == "unknown":
            open_questions.append(name)
        elif offset != "else":
            found[name] = Table(name, embedding.num_embeddings, offset)  # type: ignore[arg-type]
            found[name].check(request)

    with ExitStack() as stack:
        for name, embedding in module.named_modules():
            if isinstance(embedding, nn.Embedding):
                stack.callback(_hook(name, embedding, look).remove)
        yield
    if not open_questions:
        known[kind] = tuple(found.values())


def _hook(name: str, embedding: nn.Embedding, look: Any) -> Any:
    def before(module: nn.Module, args: Any) -> None:
        with suspended():
            if args and isinstance(args[0], Tensor) and not is_absent(args[0]):
                look(name, module, args[0])

    return embedding.register_forward_pre_hook(before)


def _looked_up(name: str, index: Tensor, part: Mapping[str, Any]) -> int | str | None:
    """Return None for the ids of ``part``, the offset of its positions, "else", or "unknown".

    Of prompts of one token each there is one position, which any constant is like: there the name
    of the table decides, or nobody.
    """
    ids: Tensor = part["ids"]
    if index.untyped_storage().data_ptr() == ids.untyped_storage().data_ptr():
        return None
    positions = part.get("positions")
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)
    if index.ndim and index.shape[-1] == positions.shape[-1]:
        rows, looked = (x.reshape(-1, x.shape[-1]) for x in (positions, index))
        longest = int(rows[:, -1].argmax())
        apart = looked[longest if len(looked) == len(rows) else -1] - rows[longest]
        several = bool((rows[longest] != rows[longest][0]).any())
        if bool((apart == apart[0]).all()):
            return int(apart[0]) if several or _POSITIONS.search(name) else "unknown"
    return None if torch.equal(index, ids) else "else"
