"""What pairs cost, by formula: parameters and FLOPs from a model's config.json. Plain arithmetic, no torch.

One pair with prompt P and responses C and R (tokens), N_b body and N_h head parameters, a forward:

    without sharing   2 N_b (2P + C + R) + A(P + C, 0) + A(P + R, 0) + 2 N_h S
    shared            2 N_b (P + C + R)  + A(P + C, 0) + A(R, P)     + 2 N_h S

with A(q, k0) = 4 L h hd (q k0 + q^2 / 2) for q queries after k0 earlier keys, and S scored tokens. A training
step is three forwards; what is run again to save memory is no useful work. Not here: bytes and seconds
(`estimate`), what is run in which order (`packing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# Elements of one [tokens, vocabulary] chunk of the log-prob head: 32 Mi are 128 MiB in fp32; fewer rows a chunk make
# thin, slow matmuls. A GPU wants 4k tokens and more (performance figures of the field, not measured here).
HEAD_CHUNK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 29}


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only language model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """From the fields of a config.json (`config.to_dict()` of a loaded one).

        Raises:
            KeyError: a field is missing.
            ValueError: a field is no number of anything.
        """

        def size(value: Any) -> int:
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{value!r} is no size")
            return value

        def field(name: str, older: str) -> int:
            return size(config[name] if config.get(name) is not None else config[older])

        heads, hidden = field("num_attention_heads", "n_head"), field("hidden_size", "n_embd")
        return cls(
            layers=field("num_hidden_layers", "n_layer"),
            hidden=hidden,
            intermediate=size(config.get("intermediate_size") or config.get("n_inner") or 4 * hidden),
            heads=heads,
            kv_heads=size(config.get("num_key_value_heads") or heads),
            head_dim=size(config.get("head_dim") or hidden // heads),
            vocab=size(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def block_params(self) -> int:
        """Matrix parameters of one decoder block (norms and biases, below a thousandth, left out)."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def body_params(self) -> int:
        """N_b: matrix parameters of all blocks."""
        return self.layers * self.block_params

    @property
    def head_params(self) -> int:
        """N_h: parameters of the output layer."""
        return self.hidden * self.vocab

    @property
    def params(self) -> int:
        """Parameters that are stored: blocks, output layer, and the embedding unless it is the same matrix."""
        return self.body_params + self.head_params * (1 if self.tied else 2)

    def work(self, lengths: np.ndarray, share: bool) -> np.ndarray:
        """`pair_flops` of each row of lengths, by which ranks are balanced. Shapes: (P, 3) -> (P,)"""
        import numpy as np  # listing runs does without

        return np.array([self.pair_flops(pair, share) for pair in lengths.tolist()])

    def attention_flops(self, queries: int, earlier: int) -> float:
        """A(q, k0): causal attention of q queries that also see k0 earlier keys, a forward, all layers."""
        return 4.0 * self.layers * self.heads * self.head_dim * (queries * earlier + queries**2 / 2)

    def pair_flops(self, lengths: Sequence[int], share: bool, scored: int | None = None) -> float:
        """FLOPs of one forward over a pair.

        Args:
            lengths: (shared prefix, whole chosen text, whole rejected text), tokens.
            share: whether the prefix is run once.
            scored: tokens that get a log-prob; what follows the prefix when left out.
        """
        shared, chosen, rejected = lengths
        if scored is None:
            scored = chosen + rejected - 2 * shared
        prefix = shared if share else 0
        body = 2.0 * self.body_params * (chosen + rejected - prefix)
        attention = self.attention_flops(chosen, 0) + self.attention_flops(rejected - prefix, prefix)
        return body + attention + 2.0 * self.head_params * scored
