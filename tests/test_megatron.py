"""The adapter to Megatron's schedules: gradients of the unsplit program, nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from nemo2.errors import PipelineError
from nemo2.pipeline.megatron import Chunk, Groups, run_schedule
from tests.pool import Pool
from tests.stage_programs import KINDS, STRIDED, Program, Setup, Tensors

pytestmark = pytest.mark.timeout(240)


def gradients_job(kinds: list[str], counts: list[int], virtual_stages: int = 1) -> list[str]:
    """Return where this rank's gradients or losses differ from the unsplit program's."""
    from megatron.core import parallel_state

    wrong = []
    for kind in kinds:
        for microbatches in counts:
            setup = Setup(kind, virtual_stages)
            losses, expected = setup.reference(microbatches)
            got = setup.run(microbatches)
            if len(got) != (microbatches if setup.rank == setup.size - 1 else 0):
                wrong.append(f"{kind} x {microbatches}: {len(got)} losses")
            # What was a transposed view arrives contiguous, and sums run in another order.
            tolerance = 1e-12 if kind in STRIDED else 0.0
            if any(abs(a - b) > tolerance for a, b in zip(got, losses, strict=False)):
                wrong.append(f"{kind} x {microbatches}: losses {got} instead of {losses}")
            for (name, p), want in zip(setup.own.named_parameters(), expected, strict=True):
                zero = torch.zeros_like(p)
                a = zero if p.grad is None else p.grad
                b = zero if want is None else want
                difference = (a - b).abs().max().item()
                if difference > tolerance:
                    wrong.append(f"{kind} x {microbatches}: {name} differs by {difference}")
    assert not parallel_state.is_initialized()
    return wrong


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_gradients_and_losses_equal_the_unsplit_program(pool: Pool, pp: int) -> None:
    # To the last bit: the same operations in the same order, joined and cut without loss.
    assert pool.run(pp, gradients_job, list(KINDS), [1, 2, 5, 8]) == [[]] * pp


@pytest.mark.parametrize(("pp", "virtual_stages"), [(2, 2), (2, 3), (3, 2), (4, 2)])
def test_interleaved_gradients_and_losses_equal_the_unsplit_program(
    pool: Pool, pp: int, virtual_stages: int
) -> None:
    kinds = list(KINDS) if pp == 2 else ["one", "two", "frozen", "unused", "empty"]
    counts = [pp, 2 * pp, 4 * pp]
    assert pool.run(pp, gradients_job, kinds, counts, virtual_stages) == [[]] * pp


def gradient_flow_job(virtual_stages: int) -> list[tuple[bool, bool]]:
    """Return for each stage if it has a gradient at all, in the reference and in the schedule."""
    setup = Setup("one", virtual_stages)
    own = [stage.a.weight for stage in setup.own]
    setup.run(4)
    got = [bool(p.grad.abs().max() > 0) for p in own]
    setup.own.zero_grad()
    _, expected = setup.reference(4)
    return [(bool(e.abs().max() > 0), g) for e, g in zip(expected[::4], got, strict=True)]


@pytest.mark.parametrize("virtual_stages", [1, 2])
def test_the_comparison_is_of_something(pool: Pool, virtual_stages: int) -> None:
    expected = [[(True, True)] * virtual_stages] * 4
    assert pool.run(4, gradient_flow_job, virtual_stages) == expected


def forward_only_job(microbatches: int, virtual_stages: int) -> list[Any]:
    setup = Setup("beside", virtual_stages)
    flags = []

    class Forward(Program):
        def forward(self, microbatch: int, received: Tensors) -> Any:
            flags.append([t.requires_grad for t in received])
            values = self.stage(microbatch, received)
            if not self.last:
                return values
            return {"microbatch": microbatch, "sum": values[0].sum().item()}

    def no_sync() -> Any:
        raise AssertionError("entered in a forward-only run")

    out: list[Any] = []
    for manager in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with manager:
            out.append(setup.run(microbatches, make=Forward, forward_only=True, no_sync=no_sync))
    assert not any(any(f) for f in flags)
    assert out[0] == out[1] == out[2]
    with torch.no_grad():
        expected = []
        for microbatch in range(microbatches):
            values: Tensors = ()
            for stage in setup.stages:
                values = stage(microbatch, values)
            expected.append({"microbatch": microbatch, "sum": values[0].sum().item()})
    assert out[0] == (expected if setup.rank == setup.size - 1 else [])
    return [p.grad for p in setup.own.parameters()]


@pytest.mark.parametrize(("pp", "virtual_stages"), [(1, 1), (2, 1), (4, 1), (2, 2), (3, 3)])
def test_forward_only_returns_any_object_and_makes_no_gradient(
    pool: Pool, pp: int, virtual_stages: int
) -> None:
    microbatches = 5 if virtual_stages == 1 else 6
    got = pool.run(pp, forward_only_job, microbatches, virtual_stages)
    assert got == [[None] * 4 * virtual_stages] * pp


class Noted(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def order_job(microbatches: int, kind: str = "one", virtual_stages: int = 1) -> list[str]:
    """Return the order of forwards, backwards and no_sync; check which modes are active."""
    setup = Setup(kind, virtual_stages)
    events: list[str] = []
    modes = set()

    def note(event: str) -> None:
        events.append(event)
        modes.add(tuple(type(m).__name__ for m in _get_current_function_mode_stack()))

    @contextmanager
    def no_sync() -> Iterator[None]:
        note("enter")
        with Noted():
            yield
        note("exit")

    for stage in setup.own:
        if stage.a.weight.requires_grad:
            stage.a.weight.register_post_accumulate_grad_hook(lambda p: note("backward"))
    setup.run(microbatches, before=lambda m: note(f"forward {m}"), no_sync=no_sync)
    assert modes <= {(), ("Noted",)}, modes
    assert not _get_current_function_mode_stack()
    return events


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("microbatches", [1, 2, 6])
def test_no_sync_covers_all_but_the_last_backward(pool: Pool, pp: int, microbatches: int) -> None:
    for rank, events in enumerate(pool.run(pp, order_job, microbatches)):
        assert events.count("backward") == microbatches
        forwards = [e for e in events if e.startswith("forward")]
        assert forwards == [f"forward {m}" for m in range(microbatches)]
        steps = [e for e in events if e == "backward" or e in forwards]
        warmup = steps.index("backward")
        assert warmup == min(pp - rank, microbatches)  # 1F1B holds no more in memory
        if pp == 1 and microbatches == 1:
            assert "enter" not in events
            continue
        assert (events.count("enter"), events.count("exit")) == (1, 1)
        assert events[0] == "enter"
        left = events.index("exit")
        assert events[:left].count("backward") == microbatches - 1
        assert events[left:].count("backward") == 1


@pytest.mark.parametrize("kind", ["one", "frozen", "frozen middle"])
@pytest.mark.parametrize(("pp", "virtual_stages"), [(2, 2), (2, 3), (3, 2)])
def test_no_sync_covers_all_but_the_last_backward_of_a_rank(
    pool: Pool, pp: int, virtual_stages: int, kind: str
) -> None:
    for rank, events in enumerate(pool.run(pp, order_job, 2 * pp, kind, virtual_stages)):
        own = range(rank, pp * virtual_stages, pp)
        frozen = {"one": (), "frozen": (0, 1), "frozen middle": own[rank == 0 :]}[kind]
        last_of_all = pp * virtual_stages - 1
        trained = [i for i in own if i not in frozen or i == last_of_all]
        assert events.count("backward") == 2 * pp * len(trained)
        assert (events.count("enter"), events.count("exit")) == (1, 1)
        assert events[0] == "enter"
        # A frozen stage in the middle has a backward, too, that this hook does not see.
        after = events[events.index("exit") :].count("backward")
        assert after == (1 if kind != "frozen middle" or rank == 0 else 0)


class Planted(BaseException):
    pass


def exception_job(kind: str) -> str:
    setup = Setup("two")
    planted = Planted() if kind == "base" else ValueError("planted")
    events = []

    @contextmanager
    def no_sync() -> Iterator[None]:
        events.append("enter")
        try:
            yield
        finally:
            events.append("exit")

    # The first microbatch at which no stage waits for another one: all raise.
    fatal = setup.size - 1 - setup.rank

    def before(microbatch: int) -> None:
        if microbatch == fatal:
            raise planted

    with pytest.raises(type(planted)) as caught:
        setup.run(6, before=before, no_sync=no_sync)
    assert caught.value is planted
    assert planted.__cause__ is None
    assert events == ["enter", "exit"]
    assert not _get_current_function_mode_stack()
    dist.barrier()
    _, expected = setup.reference(2)
    setup.run(2)  # and the next step is sound
    assert all(
        torch.equal(p.grad, g) for p, g in zip(setup.own.parameters(), expected, strict=True)
    )
    return type(planted).__name__


@pytest.mark.parametrize("kind", ["base", "error"])
@pytest.mark.parametrize("pp", [1, 4])
def test_an_exception_of_the_program_leaves_unchanged(pool: Pool, pp: int, kind: str) -> None:
    name = "Planted" if kind == "base" else "ValueError"
    assert pool.run(pp, exception_job, kind) == [name] * pp


def traffic_job(
    kind: str, microbatches: int, forward_only: bool, virtual_stages: int = 1
) -> tuple[int, int]:
    """Return how many messages this rank sends, and bytes; check that one tensor is not copied."""
    setup = Setup(kind, virtual_stages)
    sent: list[Tensor] = []
    handed: list[int] = []
    together, alone = dist.batch_isend_irecv, dist.isend

    def counted(ops: list[Any]) -> Any:
        sent.extend(op.tensor for op in ops if op.op is alone)
        return together(ops)

    def counted_alone(tensor: Tensor, *args: Any) -> Any:
        sent.append(tensor)
        return alone(tensor, *args)

    class Watched(Program):
        def forward(self, microbatch: int, received: Tensors) -> Any:
            values = super().forward(microbatch, received)
            if not self.last:
                handed.append(values[0].data_ptr())
                kept.append(values)  # the memory is not reused while we compare addresses
            return values

    kept: list[Any] = []
    dist.batch_isend_irecv = counted
    if virtual_stages > 1:  # 1F1B's are batched, and made of this one
        dist.isend = counted_alone
    try:
        setup.run(microbatches, make=Watched, forward_only=forward_only)
    finally:
        dist.batch_isend_irecv, dist.isend = together, alone
    assert all(tensor.is_contiguous() for tensor in sent)
    if kind == "one" and handed:
        assert {t.data_ptr() for t in sent} >= set(handed)
    return len(sent), sum(t.numel() * t.element_size() for t in sent)


@pytest.mark.parametrize(
    ("kind", "forward_only", "expected"),
    [
        ("one", False, [(3, 3 * 192), (6, 6 * 192), (3, 3 * 192)]),
        ("one", True, [(3, 3 * 192), (3, 3 * 192), (0, 0)]),
        # 192 bytes with gradient; 32 of int64, 24 of bool padded to 32, 4 of float padded to 16
        ("beside", False, [(6, 3 * 272), (9, 3 * 464), (3, 3 * 192)]),
        ("frozen", False, [(3, 3 * 192), (3, 3 * 192), (0, 0)]),
    ],
)
def test_messages_and_bytes(pool: Pool, kind: str, forward_only: bool, expected: list[Any]) -> None:
    assert pool.run(3, traffic_job, kind, 3, forward_only) == expected


@pytest.mark.parametrize(
    ("kind", "forward_only", "expected"),
    [
        # Stages 0 and 2, and 1 and 3: two boundaries forward and one back, one forward and two back
        ("one", False, [(12, 12 * 192), (12, 12 * 192)]),
        ("one", True, [(8, 8 * 192), (4, 4 * 192)]),
        ("beside", True, [(16, 8 * 272), (8, 4 * 272)]),
        ("frozen", False, [(8, 8 * 192), (8, 8 * 192)]),
        ("unused", False, [(12, 12 * 192), (12, 12 * 192)]),
    ],
)
def test_one_send_for_each_boundary_microbatch_and_way(
    pool: Pool, kind: str, forward_only: bool, expected: list[Any]
) -> None:
    assert pool.run(2, traffic_job, kind, 4, forward_only, 2) == expected


class Done:
    def wait(self) -> None:
        pass


def transfers(rank: int, pp: int, virtual_stages: int, microbatches: int) -> list[Any]:
    """Return what a rank starts, in order: (whether it sends, the other rank, tag)."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    started: list[Any] = []

    def note(sends: bool) -> Any:
        def start(tensor: Tensor, peer: int, group: Any, tag: int) -> Done:
            started.append((sends, peer, tag))
            return Done()

        return start

    dist.init_process_group("fake", rank=rank, world_size=pp, store=FakeStore())
    send, receive = dist.isend, dist.irecv
    dist.isend, dist.irecv = note(True), note(False)
    try:
        Setup("one", virtual_stages).run(microbatches)
    finally:
        dist.isend, dist.irecv = send, receive
        dist.destroy_process_group()
    return started


@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize(("pp", "virtual_stages"), [(2, 2), (2, 3), (3, 2), (4, 2), (5, 3)])
def test_interleaved_transfers_end_even_if_a_rank_runs_them_one_by_one(
    pp: int, virtual_stages: int, rounds: int
) -> None:
    # As NCCL does with those of a pair of ranks, or, with one communicator, with all of a rank.
    left = [transfers(r, pp, virtual_stages, rounds * pp) for r in range(pp)]
    assert sum(map(len, left)) == 4 * (pp * virtual_stages - 1) * rounds * pp
    moved = True
    while moved:
        moved = False
        for rank, own in enumerate(left):
            if own and own[0][0]:
                _, peer, tag = own[0]
                if left[peer] and left[peer][0] == (False, rank, tag):
                    own.pop(0)
                    left[peer].pop(0)
                    moved = True
    assert not any(left)


def subgroups_job() -> list[str]:
    """Two pipelines of two stages at once, over ranks that are not neighbours."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    wrong = []
    for kind in ("one", "beside"):
        setup = Setup(kind)
        setup.stages, setup.size, setup.rank = setup.stages[:2], 2, rank // 2
        _, expected = setup.reference(5)
        alone = dist.group.WORLD
        setup.run(5, pp_group=groups[rank % 2], groups=Groups(tp=alone, cp=alone, dp_cp=alone))
        pairs = zip(setup.own.parameters(), expected, strict=True)
        wrong += [kind for p, g in pairs if g is not None and not torch.equal(p.grad, g)]
    return wrong


def test_the_pipeline_may_be_a_part_of_the_world(pool: Pool) -> None:
    # A cp group of four: Megatron's two-value loss contract would multiply gradients by it.
    assert pool.run(4, subgroups_job) == [[]] * 4


def alone(program: Any, **options: Any) -> list[Any]:
    settings = {"microbatches": 2, "forward_only": False, **options}
    return run_schedule(
        [Chunk(program, None, None)],
        pp_group=None,
        pp_rank=0,
        pp_size=1,
        device=torch.device("cpu"),
        **settings,
    )


class Returns:
    def __init__(self, value: Any) -> None:
        self.value = value

    def forward(self, microbatch: int, received: Tensors) -> Any:
        return self.value


def test_one_stage_needs_no_process_group_and_keeps_the_losses() -> None:
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    kept = []

    class Loss:
        def forward(self, microbatch: int, received: Tensors) -> Tensor:
            kept.append((weight * (microbatch + 1)).sum())
            return kept[-1]

    losses = alone(Loss(), microbatches=3)
    assert [loss.item() for loss in losses] == [k.item() for k in kept] == [3.0, 6.0, 9.0]
    assert not any(loss.requires_grad for loss in losses)
    assert weight.grad is not None
    assert weight.grad.tolist() == [6.0, 6.0, 6.0]


@pytest.mark.parametrize("value", [torch.ones(2), torch.tensor(1), {"loss": 1}, (torch.ones([]),)])
def test_what_is_differentiated_must_be_a_scalar(value: Any) -> None:
    with pytest.raises(PipelineError, match=r"must return a scalar to differentiate.*\n  options:"):
        alone(Returns(value))


def test_counts_and_schedules_are_checked() -> None:
    with pytest.raises(PipelineError, match="cannot run 0 microbatches"):
        alone(Returns(None), microbatches=0)
    with pytest.raises(PipelineError, match="no pipeline schedule 'zigzag'\n  options: '1f1b'"):
        alone(Returns(None), schedule="zigzag")


def test_megatron_is_imported_by_one_file_and_only_when_it_runs() -> None:
    root = Path(__file__).parent.parent / "nemo2"
    users = [p.name for p in root.rglob("*.py") if "from megatron" in p.read_text()]
    assert users == ["megatron.py"]
    code = (
        "import sys, nemo2.pipeline.megatron as m\n"
        "assert not [n for n in sys.modules if n.startswith('megatron')]\n"
        "m._load()\n"
        "from megatron.core import parallel_state\n"
        "assert not parallel_state.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Apex" not in done.stderr
