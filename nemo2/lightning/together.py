"""Reading data that no sampler deals out: all ranks have a next batch, or none has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
import torch.distributed as dist

from ..errors import Nemo2Error


class Together:
    """Iterates over ``loader`` as long as all ranks have batches; is ``loader`` in all else.

    Args:
        done: batches to read and drop when the first iteration begins: training has seen them,
            in several rounds of data that is shorter than what is read beside it.

    Communication: one all-reduce of 3 numbers over the world for each batch.
    Raises: Nemo2Error on all ranks when some have no more batch and others do (they would wait
        in the next step for ever), or when one could not read it; there its own exception.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device, done: int = 0) -> None:
        self.loader, self.device, self._done = loader, device, done

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # while it is copied
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        if not isinstance(self.loader, Sized):
            raise TypeError(f"object of type {type(self.loader).__name__} has no len()")
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        done, self._done = self._done, 0  # not before: the Trainer may drop the first iterator
        batches, count, round_began = iter(self.loader), 0, 0
        while True:
            batch, failed, ended = None, None, False
            try:
                batch = next(batches)
            except StopIteration:
                ended = True
            except Exception as error:
                failed = error
            more = not ended and failed is None
            flags = torch.tensor([more, ended, failed is not None], dtype=torch.int32)
            flags = flags.to(self.device)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            some_have, some_ended, some_failed = flags.tolist()
            if failed is not None:
                raise failed
            if some_failed:
                raise Nemo2Error(f"batch {count} could not be read on another rank")
            if some_have and some_ended:
                here = "has ended" if ended else "goes on"
                raise Nemo2Error(
                    f"the ranks have different numbers of batches: after {count} the data of some"
                    f" has ended and that of others goes on (here it {here})\n"
                    "  options: as many batches on each rank |"
                    f" Trainer(limit_train_batches={count}), or limit_val_batches and so on"
                )
            if ended and round_began < count < done:
                batches, round_began = iter(self.loader), count
                continue
            if ended:
                return
            if count >= done:
                yield batch
            count += 1
