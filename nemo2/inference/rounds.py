"""Generation: rounds in which each sequence gets one token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Nemo2Error
from ..pipeline.identity import identity
from .calls import Call
from .feeds import CachedFeed, Feed, WholeFeed, last_logits
from .place import Place
from .request import Request
from .tables import checking_tables

Stream = Callable[[int, int], Any]


class Rounds:
    """The sequences of one request, on the ranks of a place.

    Each dp (and cp) coordinate runs the same number of rows, in microbatches; where there are
    too few prompts, copies of the first one fill them up.

    Args:
        streaming: whether some rank is told of tokens as they come.
    """

    def __init__(
        self,
        place: Place,
        call: Call,
        request: Request,
        microbatches: int | None,
        stream: Stream | None,
        streaming: bool,
    ) -> None:
        self.place, self.call, self.request = place, call, request
        self.stream, self.streaming = stream, streaming
        self.kind = (call.kind, call.cached, identity(call.step))
        self.tokens: list[list[int]] = [[] for _ in request.prompts]
        self.done = [False] * len(request.prompts)
        self.error: Exception | None = None
        rows = -(-len(request.prompts) // place.coordinates)
        wanted = max(place.stages, place.microbatches) if place.stages > 1 else 1
        self.size = -(-rows // min(microbatches or wanted, rows))
        count = -(-rows // self.size)
        self.rows = self.size * count  # of each coordinate
        first = place.coordinate * self.rows
        self.own = range(first, first + self.rows)
        self.feeds = [self._feed(number, count) for number in range(count)]

    def _feed(self, number: int, count: int) -> Feed:
        prompts = self.request.prompts
        rows = self.own[number * self.size : (number + 1) * self.size]
        kind = CachedFeed if self.call.cached else WholeFeed
        return kind(
            [prompts[r] if r < len(prompts) else prompts[0] for r in rows],
            self.request.longest,
            self.request.new,
            number,
            self.place.device,
        )

    def run(self) -> list[list[int]]:
        """Return the new tokens of each prompt, a stop token included."""
        for number in range(self.request.new):
            table = self._exchanged(self._round(number), number)
            for feed in self.feeds:
                rows = self.own[feed.number * self.size : (feed.number + 1) * self.size]
                feed.append([table[r] for r in rows])
            self._take(table)
            if all(self.done):
                break
        if self.streaming:
            self._exchanged([], self.request.new)  # of what the last call of a stream raised
        return self.tokens

    def _round(self, number: int) -> list[Tensor]:
        """Run all microbatches; return their next tokens where they are known."""
        call, feeds = self.call, self.feeds

        def step(module: nn.Module, part: Mapping[str, Any]) -> Tensor:
            logits = call.logits(module, part, feeds[part["microbatch"]].cache)
            return last_logits(logits, part.get("last"))

        parts = [feed.part() for feed in feeds]
        check: Any = nullcontext()
        if number == 0:
            check = checking_tables(self.place.inner, self.kind, self.request, parts[0])
        with check:
            results = self.place.run(step, parts, ("generate", *self.kind))
        if not self.place.speaks:
            return []
        return [self._chosen(logits, i, number) for i, logits in enumerate(results)]

    def _chosen(self, logits: Tensor, microbatch: int, number: int) -> Tensor:
        """Return the next tokens (batch) of a microbatch; -1 where no logit is the largest."""
        rows = self.own[microbatch * self.size : (microbatch + 1) * self.size]
        tokens = self.request.sampling.choose(logits, rows, number)
        return tokens.masked_fill(~logits.amax(-1).isfinite(), -1)

    def _exchanged(self, chosen: Sequence[Tensor], number: int) -> list[int]:
        """Return the next token of every row of every coordinate, the same on all ranks.

        Raises: Nemo2Error where the logits are no numbers, or another rank's stream has raised;
            on that rank, what it has raised.
        """
        size = self.place.coordinates * self.rows
        table = torch.zeros(size + 1, dtype=torch.long, device=self.place.device)
        if chosen:
            table[self.own.start : self.own.stop] = torch.cat(list(chosen))
        if self.error is not None:
            table[size] = 1
        *tokens, failed = self.place.total(table)
        if self.error is not None:
            raise self.error
        if failed:
            raise Nemo2Error(
                f"generate: stream raised an error on {failed} other rank(s), after {number} tokens"
            )
        if min(tokens) < 0:
            row = next(r for r, t in enumerate(tokens) if t < 0)
            raise Nemo2Error(
                f"generate: the logits of token {number} of prompt {min(row, len(self.tokens) - 1)}"
                " are not numbers: nan, or infinite"
            )
        return tokens

    def _take(self, table: Sequence[int]) -> None:
        """Add the tokens of this round to the sequences that have not ended."""
        for prompt, tokens in enumerate(self.tokens):
            if self.done[prompt]:
                continue
            tokens.append(table[prompt])
            self.done[prompt] = table[prompt] in self.request.stop
            if self.stream is not None and self.error is None:
                try:
                    self.stream(prompt, table[prompt])
                except Exception as error:  # raised when all ranks know
                    self.error = error
