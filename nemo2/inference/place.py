"""Where a model runs: on one device, or on the mesh of a ``ParallelModel``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import Nemo2Error
from ..inside import model_around

if TYPE_CHECKING:
    from ..model import ParallelModel

Step = Callable[[nn.Module, Any], Any]
T = TypeVar("T")


class OneDevice:
    """A module that is whole on the device of its first parameter.

    Attributes:
        inner: the module that generates.
        coordinates, coordinate: how many parts of the prompts run beside each other, and which
            of them is this rank's.
        stages: of the pipeline; microbatches: those that it was made for.
        speaks: whether this rank's tokens are the ones that count.
    """

    coordinates, coordinate, stages, microbatches, speaks = 1, 0, 1, 1, True

    def __init__(self, module: nn.Module) -> None:
        self.inner = module
        first = next(module.parameters(), None)
        if first is not None and first.is_meta:
            raise Nemo2Error("generate: the model is on meta, and has no weights")
        self.device = torch.device("cpu") if first is None else first.device

    def agreed(self, make: Callable[[], T], same: Callable[[T], str], flag: bool) -> tuple[T, bool]:
        """Return what ``make`` makes, the same on all ranks, and whether any rank has the flag.

        Args:
            same: gives a text that is equal for what is the same.
        """
        return make(), flag

    @contextmanager
    def inferring(self) -> Iterator[None]:
        """Evaluate inside: no gradients, no dropout; what was set before comes back."""
        with torch.inference_mode(False), torch.no_grad(), _evaluating(self.inner):
            yield

    def run(self, step: Step, parts: Sequence[Any], key: Any) -> list[Any]:
        """Run ``step(module, part)`` on each part; the results on the last stage, else []."""
        return [step(self.inner, part) for part in parts]

    def total(self, table: Tensor) -> list[int]:
        """Sum ``table`` over all ranks."""
        counts: list[int] = table.tolist()
        return counts


class OnMesh:
    """A module in a ``ParallelModel``; the attributes and methods are those of ``OneDevice``."""

    def __init__(self, parallel: ParallelModel, name: str) -> None:
        groups = parallel.groups
        if parallel.storage.shown:
            raise Nemo2Error(
                "generate is called inside of a step that runs\n"
                "  options: between steps; in a LightningModule a hook such as on_train_batch_end"
            )
        self.parallel, self.name, self.groups = parallel, name, groups
        self.inner = parallel.module.get_submodule(name)
        self.device = groups.device
        self.coordinates, self.coordinate = groups.dp_cp.size(), groups.dp_cp.rank()
        self.stages = len(parallel.plan.stages)
        self.microbatches = parallel.plan.options.pipeline.microbatches
        self.speaks = parallel.runner.last and groups.tp_rank == 0

    def agreed(self, make: Callable[[], T], same: Callable[[T], str], flag: bool) -> tuple[T, bool]:
        """Return what ``make`` makes, the same on all ranks, and whether any rank has the flag.

        Communication: one all-gather of short objects over the world.
        Raises: Nemo2Error on all ranks, when it is raised on one of them or they differ.
        """
        made, mine = None, ("", "", flag)
        try:
            made = make()
            mine = (same(made), "", flag)
        except Nemo2Error as error:
            mine = ("", str(error), flag)
        everyone = [mine]
        if self.groups.sizes.world > 1:
            everyone = [mine] * self.groups.sizes.world
            dist.all_gather_object(everyone, mine, group=self.groups.world)
        errors = [error for _, error, _ in everyone if error]
        if errors:
            raise Nemo2Error(errors[0])
        odd = [rank for rank, (text, _, _) in enumerate(everyone) if text != everyone[0][0]]
        if odd:
            raise Nemo2Error(
                f"generate was called with other arguments on ranks {odd} than on rank 0\n"
                "  options: the same prompts and arguments on every rank"
            )
        assert made is not None
        return made, any(flagged for _, _, flagged in everyone)

    @contextmanager
    def inferring(self) -> Iterator[None]:
        """Evaluate inside, on live weights that are gathered once."""
        whole, ready = self.parallel.module, self.parallel.inferring()
        with torch.inference_mode(False), torch.no_grad(), _evaluating(whole), ready:
            yield

    def run(self, step: Step, parts: Sequence[Any], key: Any) -> list[Any]:
        """Run ``step(module, part)`` on each part; the results on the last stage, else []."""

        def inside(root: nn.Module, part: Any) -> Any:
            return step(root.get_submodule(self.name), part)

        return self.parallel.run_whole(inside, parts, key=(*key, self.name))

    def total(self, table: Tensor) -> list[int]:
        """Sum ``table`` over all ranks.

        Communication: one all-reduce of the table over the world.
        """
        if self.groups.sizes.world > 1:
            dist.all_reduce(table, group=self.groups.world)
        counts: list[int] = table.tolist()
        return counts


Place = OneDevice | OnMesh


def place_of(model: nn.Module) -> Place:
    """Return where ``model`` runs: a ``ParallelModel``, a module inside of one, or neither."""
    from ..model import ParallelModel

    if isinstance(model, ParallelModel):
        return OnMesh(model, "")
    if not isinstance(model, nn.Module):
        raise Nemo2Error(f"generate: {type(model).__name__} is not a module")
    around = model_around(model)
    return OnMesh(*around) if around is not None else OneDevice(model)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put all modules in eval mode, each back into its own at the end."""
    before = [(m, m.training) for m in module.modules()]
    for m, _ in before:
        m.training = False
    try:
        yield
    finally:
        for m, training in before:
            m.training = training
