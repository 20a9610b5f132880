"""What values a field of the report may hold, for the reader and for the JSON Schema alike.

    number_bounds(Metrics, "cosine_min", float)      # (-1.000001, 1.000001)

A number is never negative and never larger than LARGEST unless NUMBERS says otherwise; a list is never longer than
MOST_ITEMS unless ITEMS does.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from gptoss_export.validators.consistency import ConsistencyCheck
from gptoss_export.validators.evidence import Evidence
from gptoss_export.validators.gates import FloorCounts, Gates
from gptoss_export.validators.layers import Bisection
from gptoss_export.validators.metrics import BUCKETS, HISTOGRAM_EDGES, Metrics
from gptoss_export.validators.positions import TextsRecord
from gptoss_export.validators.ranges import RangeRecord
from gptoss_export.validators.report.schema import KLByPosition, ParityReport, ProbeRecord
from gptoss_export.validators.routing import WORST_FLIPS, Flip, RoutingLayer, RoutingRecord
from gptoss_export.validators.verdict import Case, Failure, Verdict

Bounds = tuple[float, float]

LARGEST_INTEGER = 2**63 - 1
LARGEST_FLOAT = sys.float_info.max
MOST_LAYERS = 1024
MOST_EXPERTS = 4096
MOST_ITEMS = 4096
MOST_POSITIONS = 1 << 20

_SHARE: Bounds = (0.0, 1.0)
_ANY: Bounds = (-LARGEST_FLOAT, LARGEST_FLOAT)
_RANK: Bounds = (1.0, LARGEST_INTEGER)
_COSINE: Bounds = (-1.000001, 1.000001)
"""Rounding carries a cosine a little beyond 1."""

NUMBERS: Mapping[type, Mapping[str, Bounds]] = {
    Metrics: {
        "top5_overlap": _SHARE,
        "top10_overlap": _SHARE,
        "rank_mean": _RANK,
        "rank_max": _RANK,
        "cosine_mean": _COSINE,
        "cosine_min": _COSINE,
        "text_prob_diff_mean": (-1.0, 1.0),
        "text_prob_diff_max": _SHARE,
    },
    Evidence: {"num_layers": (1, MOST_LAYERS)},
    Flip: {"mass": _SHARE},
    ProbeRecord: {"tokens": (0, MOST_POSITIONS)},
    RoutingLayer: {"mass_mean": _SHARE},
    RangeRecord: {"headroom_bits": _ANY},
    Gates: {"min_top1_agreement": _SHARE},
    Failure: {"measured": _ANY, "limit": _ANY},
    Case: {"measured": _ANY, "limit": _ANY},
}

ITEMS: Mapping[type, Mapping[str, tuple[int, int]]] = {
    Metrics: {"kl_histogram": (len(HISTOGRAM_EDGES) + 1, len(HISTOGRAM_EDGES) + 1)},
    RoutingLayer: {"visits": (1, MOST_EXPERTS)},
    RoutingRecord: {"layers": (0, MOST_LAYERS), "worst": (0, WORST_FLIPS)},
    Evidence: {"layers": (0, MOST_LAYERS), "ranges": (0, 8 * MOST_LAYERS)},
    TextsRecord: {"margins": (0, MOST_POSITIONS)},
    FloorCounts: {"margins": (0, MOST_POSITIONS)},
    ConsistencyCheck: {"diffs": (0, MOST_POSITIONS)},
    KLByPosition: dict.fromkeys(("start", "stop", "mean", "max"), (0, BUCKETS)),
    ParityReport: {"floors": (0, 2)},
    Verdict: {"failures": (0, 64 * MOST_LAYERS)},
    Bisection: {"findings": (0, 8 * MOST_LAYERS)},
}


def number_bounds(kind: type, name: str, of: type) -> Bounds:
    """The smallest and the largest number of a field that is an `of`, int or float."""
    return NUMBERS.get(kind, {}).get(name, (0, LARGEST_INTEGER if of is int else LARGEST_FLOAT))


def item_bounds(kind: type, name: str) -> tuple[int, int]:
    """The fewest and the most items of a field that is a list."""
    return ITEMS.get(kind, {}).get(name, (0, MOST_ITEMS))
