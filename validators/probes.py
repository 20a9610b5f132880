"""The token sequences that parity is measured on.

Lengths come from the sliding window w, because that is where attention goes wrong: 1, w-1, w, w+1 and
beyond 2w; `long_probe` goes beyond the context that YaRN stretches. Tokens are real text (plain, code, chat,
several scripts), which visits experts as users do: for gpt-oss' own vocabulary ids that are shipped in `data/`,
else the same texts through the checkpoint's tokenizer. Without one they are pseudo-random, the same on every
machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gptoss_export.exporter.checkpoint.config import ModelConfig
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.checkpoint.tokenizer import raise_as_tokenizers, read_tokenizer
from gptoss_export.exporter.errors import PromptError
from gptoss_export.validators.scenarios import Effort
from gptoss_export.validators.texts import TEXTS, long_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DATA = Path(__file__).with_name("data")
SHIPPED_VOCABULARY = 201088
"""gpt-oss' own, which is that of o200k_harmony padded; `data/` holds ids of it."""

LONGEST = 1024
"""Tokens a probe, whatever the window: the reference's eager attention grows with the square."""

LONGEST_LONG = 8192
LONG = "long"

_NEXT_STEP = "Replace it by the tokenizer.json that belongs to the checkpoint, or remove it."


@dataclass(frozen=True)
class Probe:
    """Token ids under a name."""

    name: str
    ids: tuple[int, ...]

    @property
    def sha256(self) -> str:
        """Hex digest of the ids as little-endian int64."""
        return hashlib.sha256(np.array(self.ids, "<i8").tobytes()).hexdigest()


def default_probes(
    checkpoint: Checkpoint, effort: Effort, heldout_ids: Sequence[int] | None = None
) -> tuple[Probe, ...]:
    """The probes of this effort: quick is at most 2w + 64 tokens in three probes, full several hundred in
    six.

    heldout_ids: tokens of the caller's own to run instead, repeated where they are too few.
    Raises TokenizerError for a tokenizer.json that is needed and is none, PromptError for heldout_ids outside of the
    vocabulary.
    """
    config = checkpoint.config
    lengths = default_lengths(config, effort)
    if heldout_ids is not None:
        if not heldout_ids or not all(0 <= token < config.vocab_size for token in heldout_ids):
            raise PromptError(
                f"the probe's token ids are none, or not all below the vocabulary's {config.vocab_size}",
                "Use ids of this checkpoint's tokenizer.",
            )
        streams = {"heldout": list(heldout_ids)}
    else:
        streams = _streams(checkpoint, TEXTS)
    names = list(streams)
    probes = []
    for k, n in enumerate(lengths):
        if not names:
            probes.append(Probe(f"random-{n}", _random(k, n, config.vocab_size)))
            continue
        # Each probe starts with another text, so that rows of one batch differ.
        order = names[k % len(names) :] + names[: k % len(names)]
        tokens = [token for name in order for token in streams[name]]
        ids = tuple(tokens[i % len(tokens)] for i in range(n))
        probes.append(Probe(f"{order[0]}-{n}", ids))
    return tuple(probes)


def default_lengths(config: ModelConfig, effort: Effort) -> list[int]:
    """How many tokens each of the default probes has."""
    lengths = [min(n, config.max_positions, LONGEST) for n in _lengths(config.sliding_window, effort)]
    # An absurdly short context makes several lengths the same; one probe of each is enough.
    return sorted({n for n in lengths if n > 0})


def _lengths(window: int, effort: Effort) -> tuple[int, ...]:
    if effort == "quick":
        # 1 + at most 54 + 2w + 9 = 2w + 64.
        return 1, min(window + 11, 54), 2 * window + 9
    return 1, window - 1, window, window + 1, 2 * window + 9, max(3 * window + 23, 320)


def long_probe(checkpoint: Checkpoint) -> Probe | None:
    """A probe an eighth longer than the context that YaRN stretches (4608 tokens for gpt-oss), where wrong
    frequencies show; None without YaRN, or where the model's context or LONGEST_LONG is shorter.

    transformers' eager attention takes some 20 bytes * heads * 4608**2 for it: 27 GB for gpt-oss-20b. It is for an
    engine's checks against itself. Raises TokenizerError as `default_probes`.
    """
    config = checkpoint.config
    if config.yarn is None:
        return None
    n = config.yarn.original_context + max(config.yarn.original_context // 8, 1)
    if n > min(config.max_positions, LONGEST_LONG):
        return None
    stream = _streams(checkpoint, {LONG: long_text()}).get(LONG)
    if stream is None:
        return Probe(f"random-{n}", _random(len(TEXTS), n, config.vocab_size))
    return Probe(f"{LONG}-{n}", tuple(stream[i % len(stream)] for i in range(n)))


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The checkpoint's tokenizer; None when it has none. Raises TokenizerError for a tokenizer.json that is none."""
    tokenizer_file = next((f for f in checkpoint.side_files if f.name == "tokenizer.json"), None)
    if tokenizer_file is None:
        return None
    return read_tokenizer(tokenizer_file, _NEXT_STEP)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text's ids, special tokens such as <|start|> recognised. Raises TokenizerError when the tokenizer fails."""
    try:
        ids: list[int] = tokenizer.encode(text).ids
    except BaseException as error:
        raise_as_tokenizers(error, "the checkpoint's tokenizer.json is no tokenizer", _NEXT_STEP)
    return ids


def shipped_ids(name: str) -> list[int]:
    """Ids of o200k_harmony of one of TEXTS, or of LONG."""
    ids: list[int] = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))["ids"]
    return ids


def _streams(checkpoint: Checkpoint, texts: Mapping[str, str]) -> dict[str, list[int]]:
    """The texts as ids by name; none without a tokenizer, or with one that has no id of this vocabulary for
    them."""
    vocab_size = checkpoint.config.vocab_size
    if vocab_size == SHIPPED_VOCABULARY:
        return {name: shipped_ids(name) for name in texts}
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        return {}
    streams = {name: [t for t in encode(tokenizer, text) if t < vocab_size] for name, text in texts.items()}
    return {name: ids for name, ids in streams.items() if ids}


def _random(seed: int, n: int, vocab_size: int) -> tuple[int, ...]:
    """n ids below vocab_size out of SHA-256, which no library version changes."""

    def draw() -> Iterator[int]:
        for i in range(n):
            digest = hashlib.sha256(f"gptoss-export probe {seed} token {i}".encode()).digest()
            yield int.from_bytes(digest[:8], "little") % vocab_size

    return tuple(draw())
