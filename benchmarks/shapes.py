"""Model shapes whose speed is measured, and the operations that they cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama kind, and the batch that it trains on.

    Attributes:
        ffn: width of the gated MLP; ``vocab`` is not tied.
        sequence: tokens of a sequence; ``batch``: sequences of the global batch.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    sequence: int
    batch: int

    @property
    def head(self) -> int:
        return self.width // self.heads

    @property
    def matmul_parameters(self) -> int:
        """Parameters that multiply each token: all but the embedding and the norms."""
        attention = self.width * self.head * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.ffn) + self.width * self.vocab

    @property
    def parameters(self) -> int:
        norms = (2 * self.layers + 1) * self.width
        return self.matmul_parameters + self.width * self.vocab + norms

    @property
    def flops(self) -> float:
        """Operations of forward and backward for one token, causal attention counted half."""
        attention = 12 * self.layers * self.width * self.sequence / 2
        return 6 * self.matmul_parameters + attention


SHAPES = {
    "8b16l": Shape(4096, 16, 32, 8, 14336, 128256, 8192, 16),
    "8b16l long": Shape(4096, 16, 32, 8, 14336, 128256, 32768, 4),
    "8b8l": Shape(4096, 8, 32, 8, 14336, 128256, 8192, 8),  # two GPUs of 80 GiB hold it
    "8b8l long": Shape(4096, 8, 32, 8, 14336, 128256, 32768, 2),
    "8b4l": Shape(4096, 4, 32, 8, 14336, 128256, 8192, 4),  # one GPU holds it
    "1b": Shape(2048, 16, 32, 8, 8192, 128256, 4096, 32),
    "tiny": Shape(64, 4, 4, 2, 128, 256, 32, 8),  # for a CPU: only that it runs
}
