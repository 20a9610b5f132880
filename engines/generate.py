"""Text out of logits: one row, greedy or sampled, on any runner.

    for token in generate(runner, prompt_ids, max_new_tokens=64, eos_token_ids=(200002, 199999, 200012)):
        ...

The prompt is prefilled in chunks, so that its attention scores never need more than a chunk of rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from gptoss_export.engines.runner import KVCache, Runner
from gptoss_export.exporter.errors import PromptError, SessionError

PREFILL_CHUNK = 512


def generate(
    runner: Runner,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_ids: Collection[int] = (),
) -> Iterator[int]:
    """Yields at most max_new_tokens ids as they are made; ends before an id of eos_token_ids, which is not
    yielded.

    temperature 0 takes the most likely token, the lowest id of equals. Otherwise tokens are drawn from the
    softmax of logits / temperature, cut to the top_k most likely (0: all) and then to the smallest set of at
    least top_p probability. The same seed, artifact and engine give the same tokens.

    Raises PromptError for an empty prompt, ids outside of the vocabulary or settings out of range,
    SessionError when the engine answers with logits that are not finite.
    """
    _check(runner.vocab_size, prompt_ids, max_new_tokens, temperature, top_k, top_p)
    return _generate(
        runner, prompt_ids, max_new_tokens, temperature, top_k, top_p, np.random.default_rng(seed), eos_token_ids
    )


def sample(logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float, rng: np.random.Generator) -> int:
    """One token id from logits [vocab]; see `generate` for the settings."""
    if not np.isfinite(logits).all():
        raise SessionError(
            "the engine answered with logits that are not finite", "validate the artifact: `gptoss-export validate`"
        )
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    with np.errstate(over="ignore"):  # a tiny temperature: minus infinity, hence probability 0, is right
        scaled = (logits[order].astype(np.float64) - logits[order[0]]) / temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities) - probabilities
    kept = np.where(before < top_p, probabilities, 0.0)
    return int(rng.choice(order, p=kept / kept.sum()))


def _generate(
    runner: Runner,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    rng: np.random.Generator,
    eos_token_ids: Collection[int],
) -> Iterator[int]:
    if max_new_tokens == 0:
        return
    cache: KVCache | None = None
    prompt = np.array([prompt_ids], np.int64)
    for start in range(0, prompt.shape[1], PREFILL_CHUNK):
        step = runner.forward(prompt[:, start : start + PREFILL_CHUNK], cache=cache, keep=1)
        cache = step.cache
    for made in range(1, max_new_tokens + 1):
        token = sample(step.logits[0, -1], temperature, top_k, top_p, rng)
        if token in eos_token_ids:
            return
        yield token
        if made < max_new_tokens:
            step = runner.forward(np.array([[token]], np.int64), cache=cache, keep=1)
            cache = step.cache


def _check(
    vocab_size: int, prompt_ids: Sequence[int], max_new_tokens: int, temperature: float, top_k: int, top_p: float
) -> None:
    if not prompt_ids:
        raise PromptError("the prompt is empty", "give at least one token")
    for token in prompt_ids:
        if not 0 <= token < vocab_size:
            raise PromptError(f"token id {token} is not in the vocabulary", f"ids are 0 to {vocab_size - 1}")
    # Written so that NaN, for which every comparison is false, is refused.
    if not (0 <= temperature < float("inf") and 0 < top_p <= 1 and top_k >= 0 and max_new_tokens >= 0):
        raise PromptError(
            f"out of range: temperature {temperature}, top_p {top_p}, top_k {top_k}, max_new_tokens {max_new_tokens}",
            "temperature from 0 on, top_p above 0 and up to 1, top_k and max_new_tokens from 0 on",
        )
