"""Pipeline stages between their programs and a schedule: what each runs, sends and receives.

Nothing here imports Megatron; ``megatron.py`` puts these under its schedules.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo2.errors import PipelineError
from nemo2.pipeline.boundary import Boundary, Parcel, pack, unpack

_GRADIENT_TAG = 2  # a parcel's buffers travel under tags 0 and 1


class StageProgram(Protocol):
    """What one pipeline stage computes."""

    def forward(self, microbatch: int, received: tuple[Tensor, ...]) -> Any:
        """Run the stage on one microbatch.

        Args:
            microbatch: 0, 1, ... in order.
            received: the tensors of the incoming boundary, in order, with those connected to
                autograd that the boundary says require grad; () on the first stage.

        Returns:
            On the last stage the scalar to differentiate (0-dim; one that does not require grad
            adds nothing), or any object when forward only; elsewhere the tuple of tensors of
            the outgoing boundary.
        """


@dataclass(frozen=True)
class Chunk:
    """One stage that a rank runs: its program, and what crosses its two ends.

    ``incoming`` is None for the first stage of the model, ``outgoing`` for the last.
    """

    program: StageProgram
    incoming: Boundary | None
    outgoing: Boundary | None


LossFunction = Callable[[Tensor], tuple[Tensor, int, Any]]


@dataclass
class Stage:
    """One stage of one run: the program, and the parcels between it and the schedule.

    The schedule holds only what it differentiates: per microbatch one leaf buffer received and
    one buffer sent. Parcels wait here, in the order in which the schedule asks for them.
    """

    program: StageProgram
    incoming: Boundary | None
    outgoing: Boundary | None
    index: int
    device: torch.device
    forward_only: bool
    arrived: deque[Parcel] = field(default_factory=deque)
    to_send: deque[Parcel] = field(default_factory=deque)
    microbatch: int = 0
    requires_grad: bool = False  # whether the last output will be differentiated

    def forward(self) -> tuple[Tensor, LossFunction]:
        """Run the program on the next microbatch; return what is differentiated, and how."""
        received: tuple[Tensor, ...] = ()
        if self.incoming is not None:
            received = unpack(self.incoming, self.arrived.popleft(), self.device)
        output = self.program.forward(self.microbatch, received)
        self.microbatch += 1
        if self.outgoing is None:
            return self._scalar(output)
        if not isinstance(output, tuple):
            output = (output,)
        training = not self.forward_only
        self.outgoing.check(output, f"pipeline stage {self.index}", training=training)
        parcel = pack(self.outgoing, output, self.device)
        self.requires_grad = parcel.buffer is not None and parcel.buffer.requires_grad
        self.to_send.append(parcel)
        return self._nothing() if parcel.buffer is None else parcel.buffer, _no_loss

    def _scalar(self, output: Any) -> tuple[Tensor, LossFunction]:
        if self.forward_only:
            return self._nothing(), lambda handle: (handle, 1, output)
        if not isinstance(output, Tensor) or output.dim() or not output.is_floating_point():
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise PipelineError(
                f"the last pipeline stage must return a scalar to differentiate, got {got}\n"
                "  options: loss.mean() | loss.sum()"
            )
        self.requires_grad = output.requires_grad
        logged = output.detach().clone()
        # Three values with a count of 1: Megatron then divides by nothing. Cloned because it
        # empties the tensors that it has differentiated, and refuses views.
        return output.clone(), lambda handle: (handle, 1, logged)

    def _nothing(self) -> Tensor:
        """A tensor for the schedule to hold where there is nothing to differentiate."""
        return torch.empty(0, device=self.device)

    def receive_forward(self) -> Parcel | None:
        return None if self.incoming is None else Parcel.empty(self.incoming, self.device)

    def keep(self, parcel: Parcel | None) -> Tensor | None:
        """Store a parcel that arrives; return the leaf that will hold the gradient to send back."""
        if parcel is None:
            return None
        self.arrived.append(parcel)
        if self.forward_only or parcel.buffer is None:
            return None
        return parcel.buffer.requires_grad_()

    def receive_backward(self) -> Tensor | None:
        if self.outgoing is None or not self.outgoing.buffer_numel:
            return None
        shape, dtype = self.outgoing.buffer_numel, self.outgoing.buffer_dtype
        return torch.empty(shape, dtype=dtype, device=self.device)

    def send_backward(self, gradient: Tensor | None) -> Tensor | None:
        """Return what travels back: zeros where the stage did not use what it received."""
        if self.incoming is None or not self.incoming.buffer_numel:
            return None
        if gradient is None:
            shape, dtype = self.incoming.buffer_numel, self.incoming.buffer_dtype
            return torch.zeros(shape, dtype=dtype, device=self.device)
        return gradient.contiguous()


def _no_loss(handle: Tensor) -> tuple[Tensor, int, Any]:
    raise AssertionError("Megatron asked a stage that is not the last for a loss")


class Exchange:
    """The methods of Megatron's communicator that 1F1B calls, by the plan and not by shapes.

    Mixed in before ``P2PCommunicator``, which brings ``pp_group``, ``prev_rank``, ``next_rank``.
    Each call posts all its sends and receives as one batch and waits for them, as Megatron's own
    batched communicator does; so NCCL runs them in one group and gloo in any order.
    """

    pp_group: ProcessGroup
    prev_rank: int
    next_rank: int

    def serve(self, stage: Stage) -> None:
        """Prepare for one run."""
        self.stage = stage

    def finish(self) -> None:
        """Nothing is under way: each call waits for what it has started."""

    def recv_forward(self, shapes: Any, is_first_stage: bool) -> list[Tensor | None]:
        return self._with_previous(None, receive=True)

    def send_forward(self, outputs: Any, is_last_stage: bool) -> None:
        self._with_next(send=True, receive=False)

    def send_forward_recv_backward(
        self, outputs: Any, shapes: Any, is_last_stage: bool
    ) -> list[Tensor | None]:
        return self._with_next(send=True, receive=True)

    def recv_backward(self, shapes: Any, is_last_stage: bool) -> list[Tensor | None]:
        return self._with_next(send=False, receive=True)

    def send_backward(self, gradients: list[Tensor | None], is_first_stage: bool) -> None:
        self._with_previous(gradients, receive=False)

    def send_backward_recv_forward(
        self, gradients: list[Tensor | None], shapes: Any, is_first_stage: bool
    ) -> list[Tensor | None]:
        return self._with_previous(gradients, receive=True)

    def _with_previous(
        self, gradients: list[Tensor | None] | None, *, receive: bool
    ) -> list[Tensor | None]:
        ops = []
        gradient = None if gradients is None else self.stage.send_backward(gradients[0])
        if gradient is not None:
            ops.append(self._op(dist.isend, gradient, self.prev_rank, _GRADIENT_TAG))
        parcel = self.stage.receive_forward() if receive else None
        for tag, message in parcel.messages() if parcel is not None else []:
            ops.append(self._op(dist.irecv, message, self.prev_rank, tag))
        _wait(ops)
        return [self.stage.keep(parcel)]

    def _with_next(self, *, send: bool, receive: bool) -> list[Tensor | None]:
        ops = []
        if send and self.stage.outgoing is not None:
            for tag, message in self.stage.to_send.popleft().messages():
                ops.append(self._op(dist.isend, message, self.next_rank, tag))
        gradient = self.stage.receive_backward() if receive else None
        if gradient is not None:
            ops.append(self._op(dist.irecv, gradient, self.next_rank, _GRADIENT_TAG))
        _wait(ops)
        return [gradient]

    def _op(self, function: Callable[..., Any], tensor: Tensor, peer: int, tag: int) -> dist.P2POp:
        return dist.P2POp(function, tensor, peer, self.pp_group, tag)


def _wait(ops: list[dist.P2POp]) -> None:
    if ops:
        for work in dist.batch_isend_irecv(ops):
            work.wait()


class Transfer:
    """Sends or receives under way; to wait for it again does nothing."""

    def __init__(self, works: list[Any]) -> None:
        self.works = works

    def wait(self) -> None:
        works, self.works = self.works, []
        for work in works:
            work.wait()


Message = tuple[int, Tensor]


class InterleavedExchange:
    """The methods of Megatron's communicator that interleaved 1F1B calls, with overlap.

    Mixed in like ``Exchange``, for ranks that run several stages. A call starts its sends and
    receives one by one and hands out what to wait for, so that they run beside the computation.
    NCCL runs those between two ranks in the order in which they were started, so both must start
    them in the same order: Megatron's order of calls, and even ranks send before they receive.
    """

    pp_group: ProcessGroup
    prev_rank: int
    next_rank: int

    def serve(self, stages: Sequence[Stage], order: Sequence[int]) -> None:
        """Prepare for one run; ``order`` is which of ``stages`` each forward step runs.

        Backward steps run them in the mirrored order.
        """
        forward, backward = [stages[i] for i in order], [stages[-1 - i] for i in order]
        self.stages, self.steps = stages, len(order)
        self.receiving: Iterator[Stage] = iter([s for s in forward if s.incoming is not None])
        self.returning: Iterator[Stage] = iter([s for s in backward if s.outgoing is not None])
        self.differentiated: Iterator[Stage] = iter(backward)
        self.ahead = True  # no gradient has been asked for or sent
        self.under_way: list[Transfer] = []

    def finish(self) -> None:
        """Wait for the sends that the schedule does not wait for."""
        for transfer in self.under_way:
            transfer.wait()

    def recv_forward(self, shape: Any, is_first_stage: bool) -> Tensor | None:
        received, _ = self._forward(None, not is_first_stage, wait=True)
        return received

    def send_forward_recv_forward(
        self,
        output: Tensor | None,
        recv_prev: bool,
        tensor_shape: Any,
        overlap_p2p_comm: bool = False,
    ) -> Any:
        received, transfers = self._forward(output, recv_prev, wait=not overlap_p2p_comm)
        return (received, transfers) if overlap_p2p_comm else received

    def recv_backward(self, shape: Any, is_last_stage: bool) -> Tensor | None:
        received, _ = self._backward([], not is_last_stage, wait=True)
        return received

    def send_backward_recv_backward(
        self,
        input_tensor_grad: Tensor | None,
        recv_next: bool,
        tensor_shape: Any,
        overlap_p2p_comm: bool = False,
    ) -> Any:
        # A gradient of None is one that does not exist (zeros travel), but for the call ahead of
        # the first backward, which only receives, and is left out if all forwards came before.
        ahead = self.ahead and sum(s.microbatch for s in self.stages) < self.steps
        self.ahead = False
        gradient = None if ahead else next(self.differentiated).send_backward(input_tensor_grad)
        messages = [] if gradient is None else [(_GRADIENT_TAG, gradient)]
        received, transfers = self._backward(messages, recv_next, wait=not overlap_p2p_comm)
        return (received, transfers) if overlap_p2p_comm else received

    def _forward(
        self, output: Tensor | None, receive: bool, *, wait: bool
    ) -> tuple[Tensor | None, dict[str, Transfer]]:
        sender = None if output is None else next(s for s in self.stages if s.to_send)
        stage = next(self.receiving) if receive else None
        parcel = None if stage is None else stage.receive_forward()
        send = [] if sender is None else sender.to_send.popleft().messages()
        arriving = [] if parcel is None else parcel.messages()
        transfers = self._start(send, self.next_rank, arriving, self.prev_rank, wait)
        named = {"send_next": transfers[0]} if sender is not None else {}
        if stage is None:
            return None, named
        return stage.keep(parcel), named | {"recv_prev": transfers[1]}

    def _backward(
        self, send: list[Message], receive: bool, *, wait: bool
    ) -> tuple[Tensor | None, dict[str, Transfer]]:
        gradient = next(self.returning).receive_backward() if receive else None
        arriving = [] if gradient is None else [(_GRADIENT_TAG, gradient)]
        transfers = self._start(send, self.prev_rank, arriving, self.next_rank, wait)
        named = {"send_prev": transfers[0]} if send else {}
        # Named also when nothing arrives: Megatron takes one for each gradient, in order.
        return gradient, named | ({"recv_next": transfers[1]} if receive else {})

    def _start(
        self, send: list[Message], to: int, receive: list[Message], source: int, wait: bool
    ) -> tuple[Transfer, Transfer]:
        """Start sends and receives; return what to wait for, unless it is waited for here."""

        def sends() -> Transfer:
            return Transfer([dist.isend(x, to, self.pp_group, tag) for tag, x in send])

        def receives() -> Transfer:
            return Transfer([dist.irecv(x, source, self.pp_group, tag) for tag, x in receive])

        if self.pp_group.rank() % 2 == 0:
            sent, received = sends(), receives()
        else:
            received, sent = receives(), sends()
        if wait:
            sent.wait()
            received.wait()
        self.under_way = [t for t in (*self.under_way, sent) if t.works]
        return sent, received
