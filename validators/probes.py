"""The token sequences that parity is measured on.

Lengths come from the sliding window w, because that is where attention goes wrong: 1, w-1, w, w+1 and
beyond 2w. With a tokenizer the tokens are real text (plain, code, chat, several scripts), which visits
experts as users do; without, they are pseudo-random, the same on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import PromptError, TokenizerError
from gptoss_export.validators.scenarios import Effort

LONGEST = 1024
"""Tokens a probe, whatever the window: the reference's eager attention grows with the square."""


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
    Raises TokenizerError for a tokenizer.json that is none, PromptError for heldout_ids outside of the
    vocabulary.
    """
    config = checkpoint.config
    lengths = [min(n, config.max_positions, LONGEST) for n in _lengths(config.sliding_window, effort)]
    # An absurdly short context makes several lengths the same; one probe of each is enough.
    lengths = sorted({n for n in lengths if n > 0})
    if heldout_ids is not None:
        if not heldout_ids or not all(0 <= token < config.vocab_size for token in heldout_ids):
            raise PromptError(
                f"the probe's token ids are none, or not all below the vocabulary's {config.vocab_size}",
                "Use ids of this checkpoint's tokenizer.",
            )
        streams = {"heldout": list(heldout_ids)}
    else:
        streams = _text_streams(checkpoint)
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


def _lengths(window: int, effort: Effort) -> tuple[int, ...]:
    if effort == "quick":
        # 1 + at most 54 + 2w + 9 = 2w + 64.
        return 1, min(window + 11, 54), 2 * window + 9
    return 1, window - 1, window, window + 1, 2 * window + 9, max(3 * window + 23, 320)


def _text_streams(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """The texts as ids by name; none without a tokenizer, or with one that has no id of this vocabulary for
    them."""
    tokenizer_file = next((f for f in checkpoint.side_files if f.name == "tokenizer.json"), None)
    if tokenizer_file is None:
        return {}
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        encoded = {name: tokenizer.encode(text).ids for name, text in TEXTS.items()}
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(
            f"{tokenizer_file} is no tokenizer: {' '.join(str(error).split())[:200]}",
            "Replace it by the tokenizer.json that belongs to the checkpoint, or remove it.",
        ) from error
    streams = {name: [t for t in ids if t < checkpoint.config.vocab_size] for name, ids in encoded.items()}
    return {name: ids for name, ids in streams.items() if ids}


def _random(seed: int, n: int, vocab_size: int) -> tuple[int, ...]:
    """n ids below vocab_size out of SHA-256, which no library version changes."""

    def draw() -> Iterator[int]:
        for i in range(n):
            digest = hashlib.sha256(f"gptoss-export probe {seed} token {i}".encode()).digest()
            yield int.from_bytes(digest[:8], "little") % vocab_size

    return tuple(draw())


TEXTS = {
    "plain": """\
The harbour was quiet before the first ferry. Two gulls argued over a crust of bread, and the woman who
opened the ticket office counted the coins in her drawer twice, because yesterday the sum had been wrong by
exactly four. She wrote the date at the top of a clean page: Tuesday, 14 March, wind from the north-west,
tide turning at 6:42. Nobody had asked her to keep a log. Her father had kept one for thirty-one years, and
when he died she found that she could not sell tickets without a pencil behind her ear. By seven there were
nineteen passengers, three bicycles, a dog and a crate marked "glass, this side up" that somebody had set
down on its side. The captain looked at the sky, at the crate, and at his watch, in that order, and said
that they would wait five minutes for the doctor.
""",
    "code": """\
from collections import deque


def shortest_path(graph: dict[str, list[str]], start: str, goal: str) -> list[str] | None:
    \"\"\"Breadth-first search; None if the goal cannot be reached.\"\"\"
    previous: dict[str, str | None] = {start: None}
    queue = deque([start])
    while queue:
        node = queue.popleft()
        if node == goal:
            path = []
            while node is not None:
                path.append(node)
                node = previous[node]
            return path[::-1]
        for neighbour in graph.get(node, []):
            if neighbour not in previous:
                previous[neighbour] = node
                queue.append(neighbour)
    return None


assert shortest_path({"a": ["b", "c"], "b": ["d"], "c": ["d"]}, "a", "d") == ["a", "b", "d"]

SELECT o.id, SUM(l.price * l.amount) AS total FROM orders o JOIN lines l ON l.order_id = o.id
WHERE o.created >= '2024-01-01' GROUP BY o.id HAVING total > 99.95 ORDER BY total DESC LIMIT 10;

for (size_t i = 0; i < n; ++i) { y[i] = alpha * x[i] + (beta ? y[i] : 0.0f); }
""",
    "chat": """\
<|start|>system<|message|>You are a careful assistant. Reasoning: low<|end|><|start|>user<|message|>A train
leaves at 9:40 and travels 210 km at 84 km/h. When does it
arrive?<|end|><|start|>assistant<|channel|>analysis<|message|>210 / 84 = 2.5 hours, so 9:40 plus 2:30 is
12:10.<|end|><|start|>assistant<|channel|>final<|message|>It arrives at **12:10**: 210 km at 84 km/h take
two and a half hours.<|return|><|start|>user<|message|>And if it stops twice for six minutes?<|end|>\
<|start|>assistant<|channel|>final<|message|>Then twelve minutes later, at 12:22.<|return|>
""",
    "scripts": """\
Der Zug hält überall außer in Großwörden. Où est la clé que j'ai laissée là-bas ?
El niño soñó con un pingüino.
Сегодня вечером мы будем читать вслух, а завтра поедем к морю. Η θάλασσα ήταν ήρεμη και ο ουρανός γαλανός.
今日は朝から雨が降っていて、駅まで傘をさして歩きました。
我们明天下午三点在图书馆门口见面。
오늘 저녁에는 된장찌개를 끓이려고 해요.
ذهبت إلى السوق لأشتري خبزا وزيتونا. हम कल सुबह नदी के किनारे टहलने जाएँगे। ∑ x² ≤ ∫ f(t) dt → ∞ 🙂🚲
""",  # noqa: RUF001 - letters of other scripts are the point
}
"""Our own words, some hundred tokens each."""
