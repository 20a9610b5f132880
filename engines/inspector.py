"""What an engine shows of its inside: its routing, and each layer alone, fed with whatever the caller chooses.

    inspector = TARGETS[name].inspect(folder, threads)
    for chunk in inspector.route(ids, rows=64): ...                     # whole model: logits and every router's choice
    for n in range(inspector.num_layers):                               # one layer in memory at a time
        out = inspector.layer(n).run(hidden[n], residual[n], ops=True)
    for chunk in inspector.ends().run(ids, hidden[-1], rows=64): ...    # the embedding, the last norm and lm_head

What runs is the artifact's own graph with its own weights and kernels; only its inputs are exchanged and more of its
values are given out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gptoss_export.engines.runner import Logits, Tokens

OPS = (
    "input_layernorm",
    "q_proj",
    "k_proj",
    "v_proj",
    "attention",
    "o_proj",
    "post_attention_layernorm",
    "router",
    "experts",
)
"""The operations of a layer as they are computed. `attention` is what o_proj gets, `experts` the weighted sum."""


@dataclass(frozen=True)
class RoutedChunk:
    """m positions of a text from `start` on.

    logits [m, V] float32; weights [m, L, K] float32 and experts [m, L, K] int64 of each layer's router.
    """

    start: int
    logits: Logits
    weights: NDArray[np.float32]
    experts: NDArray[np.int64]


@dataclass(frozen=True)
class LayerOutputs:
    """What one layer made of n positions, all float32.

    attention [n, H]: the residual stream after attention, of the `hidden` that was given. output [n, H]: the residual
    stream after the experts, of the `residual` that was given. weights, experts [n, K]: the router's, of `residual`.
    ops [n, width]: by name of OPS, `router` left out, as far as the graph shows them; empty unless asked for.
    types: the narrowest type in which the graph hands on that operation's result: float32, float16 or bfloat16.
    """

    attention: NDArray[np.float32]
    output: NDArray[np.float32]
    weights: NDArray[np.float32]
    experts: NDArray[np.int64]
    ops: Mapping[str, NDArray[np.float32]]
    types: Mapping[str, str]


@dataclass(frozen=True)
class EndsChunk:
    """What m positions of a text from `start` on enter the first layer with, and what is made of the last one's.

    embedding, norm [m, H] and logits [m, V], float32: the embedding of `ids`, the final norm and lm_head of `last`.
    """

    start: int
    embedding: NDArray[np.float32]
    norm: NDArray[np.float32]
    logits: Logits


class EndsInspector(Protocol):
    """What is no layer: the embedding before them, the final norm and lm_head behind them."""

    def run(self, ids: Tokens, last: NDArray[np.float32], *, rows: int) -> Iterator[EndsChunk]:
        """Runs these on ids [n] and on last [n, H], the residual stream behind the last layer, at most `rows` positions
        a call. Raises PromptError for ids that the model cannot take, ValueError where the two do not fit.
        """
        ...


class LayerInspector(Protocol):
    """One layer of an artifact."""

    def run(
        self,
        hidden: NDArray[np.float32],
        residual: NDArray[np.float32],
        calls: Sequence[int] | None = None,
        *,
        ops: bool = False,
    ) -> LayerOutputs:
        """Runs the attention half on hidden [n, H] and the half of the experts on residual [n, H], from position 0 on.

        calls: lengths that sum to n: the first is a prefill, the others go on with the cache; None: one call. Raises
        ValueError where these do not fit, PromptError for more positions than the engine was built for.
        """
        ...


class Inspector(Protocol):
    """An artifact, opened. description: what runs it, such as `onnxruntime 1.31.1, CPUExecutionProvider`."""

    @property
    def num_layers(self) -> int: ...

    @property
    def description(self) -> str: ...

    def route(self, ids: Tokens, *, experts: NDArray[np.int64] | None = None, rows: int) -> Iterator[RoutedChunk]:
        """Runs the whole model on ids [n], at most `rows` positions a call, with one cache.

        experts [n, L, K]: every router's choice is replaced by this one, and the weights become the softmax over the
        artifact's own logits of these experts, in the order given ("routing replay"). Raises PromptError for ids that
        the model cannot take, ValueError for experts that it has not.
        """
        ...

    def layer(self, index: int) -> LayerInspector:
        """That layer alone. It holds one layer's memory: the caller drops it before it takes the next."""
        ...

    def ends(self) -> EndsInspector:
        """The embedding, the final norm and lm_head. They hold their own memory until the caller drops them."""
        ...
