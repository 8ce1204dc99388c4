"""Failing together: what one rank alone can see becomes an error of all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from ..errors import CheckpointError, Nemo2Error
from ..mesh.groups import MeshGroups


class Problems:
    """What stands against an operation that all ranks do.

    Attributes:
        asked: what, as the error's first line says it.
        facts: about the checkpoint and the model, alike on the ranks that can see them.
        failures: of this rank; the error names the ranks.
        options: what would work, when there are facts.
    """

    def __init__(self, asked: str, groups: MeshGroups | None) -> None:
        self.asked, self.groups = asked, groups
        self.options = ""
        self.facts: list[str] = []
        self.failures: list[str] = []

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Note what is raised inside as a failure of this rank."""
        try:
            yield
        except Nemo2Error as error:
            self.failures.append(str(error))
        except Exception as error:  # an error of the file system, of memory, of a library
            self.failures.append(f"{type(error).__name__}: {error}")

    def raise_together(self, view: Any = None, *, note: str = "") -> None:
        """Raise on all ranks when one of them has problems; else return on all.

        Args:
            view: what has to be the same on all ranks.
            note: a last line for the error.

        Communication: one all-gather of objects over the world.
        Raises: CheckpointError, the same on all ranks.
        """
        everyone: list[Any] = [(self.facts, self.failures, self.options, view)]
        ranks = [0]
        if self.groups is not None and self.groups.sizes.world > 1:
            mine, world = everyone[0], self.groups.world
            ranks = dist.get_process_group_ranks(world)
            everyone = [None] * len(ranks)
            dist.all_gather_object(everyone, mine, group=world)
        facts = list(dict.fromkeys(f for own in everyone for f in own[0]))
        lines = facts + _by_ranks([own[1] for own in everyone], ranks)
        odd = [r for r, own in zip(ranks, everyone, strict=True) if own[3] != everyone[0][3]]
        if odd and not lines:
            lines = [f"ranks {odd} find other tensors there than rank {ranks[0]}"]
        if lines:
            options = next((own[2] for own in everyone if own[2]), "")
            shown = [line.replace("\n", "\n  ") for line in (*lines, note, options) if line]
            raise CheckpointError("\n  ".join([self.asked, *shown]))


def _by_ranks(failures: Sequence[Sequence[str]], ranks: Sequence[int]) -> list[str]:
    """Return each failure once, with its ranks unless it is all of them."""
    seen: dict[str, list[int]] = {}
    for rank, own in zip(ranks, failures, strict=True):
        for text in own:
            seen.setdefault(text, []).append(rank)
    lines = []
    for text, where in seen.items():
        who = f"rank{'s' * (len(where) > 1)} {', '.join(map(str, where))}: "
        lines.append(text if len(where) == len(ranks) else who + text)
    return lines
