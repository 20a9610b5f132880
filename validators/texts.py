"""The words that probes are made of: our own, so that they may be shipped and are in nobody's training data.

`data/` holds them as ids of gpt-oss' own tokenizer; `benchmarks/make_probes.py` writes it anew when they change.
"""

from __future__ import annotations

from itertools import product

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
<|start|>system<|message|>Knowledge cutoff: 2024-06
Reasoning: high

# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>\
<|start|>developer<|message|># Instructions

Answer in one sentence, and look tides up instead of guessing.

# Tools

## functions

namespace functions {

// High and low water of one harbour on one day.
type get_tides = (_: {
harbour: string,
date?: string, // year-month-day
}) => any;

} // namespace functions<|end|><|start|>user<|message|>When can I walk to the island on
Saturday?<|end|><|start|>assistant<|channel|>analysis<|message|>The causeway is dry around low water; I need
the table for Saturday.<|end|><|start|>assistant<|channel|>commentary to=functions.get_tides \
<|constrain|>json<|message|>{"harbour": "Norderhafen", "date": "2024-03-16"}<|call|>\
<|start|>functions.get_tides to=assistant<|channel|>commentary<|message|>{"high": ["04:51", "17:20"], "low":
["11:03", "23:31"]}<|end|><|start|>assistant<|channel|>final<|message|>Between about half past nine and half
past twelve, since low water is at 11:03.<|return|>
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


_KEEPERS = (
    "Ada",
    "Bruno",
    "Carla",
    "Dmitri",
    "Esther",
    "Farid",
    "Greta",
    "Hiro",
    "Ines",
    "Jonas",
    "Kavya",
    "Lev",
    "Maren",
    "Nils",
)
_THINGS = (
    "a brass compass",
    "the spare key to the boathouse",
    "a ledger bound in green cloth",
    "two jars of quince jam",
    "a map of the old canal",
    "the clarinet that nobody plays",
    "a box of blue chalk",
    "seeds of a pear tree",
)
_PLACES = (
    "behind the stove",
    "in the third drawer of the desk",
    "under a loose board by the window",
    "on the shelf above the door",
    "inside the clock",
    "in a sack of oats",
)
_REASONS = (
    "because the cellar is damp in autumn",
    "since the children would never look there",
    "although the neighbours think that it was sold",
    "so that it is at hand when the ferry comes in",
    "as was the custom of the house",
)
_TAILS = (
    "Nobody has moved it since.",
    "Twice a year it is taken out and dusted.",
    "A note on the wall says when it was last seen.",
    "The cat sleeps next to it.",
    "Whoever borrows it signs the list in the hall.",
    "In the year of the flood it floated as far as the church.",
    "It was a present from an aunt who could not keep a secret.",
)


def long_text() -> str:
    """Some 4,700 tokens of o200k_harmony: what fourteen people keep where and why. Every fourth paragraph asks for
    one far above it, so that any position has something to look back for."""
    said: list[tuple[str, str, str]] = []
    paragraphs = []
    for number, (keeper, thing) in enumerate(product(_KEEPERS, _THINGS), start=1):
        # Numbers of parts that share no factor: hardly any two paragraphs go on alike.
        place, reason, tail = (parts[number % len(parts)] for parts in (_PLACES, _REASONS, _TAILS))
        said.append((keeper, thing, place))
        paragraphs.append(f"{number}. {keeper} keeps {thing} {place}, {reason}. {tail}")
        if number % 3 == 0:
            who, what, where = said[number // 3]
            paragraphs.append(f"Where does {who} keep {what}? {where.capitalize()}.")
    return "\n".join(paragraphs) + "\n"
