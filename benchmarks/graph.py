"""The graph of a 20b- or 120b-shaped network, weights not needed: time and memory from import to serialised model.

python benchmarks/graph.py 120b
"""

from __future__ import annotations

import sys
from pathlib import Path

from measure import machine, run

BUILD = """
import sys
from gptoss_export.exporter.checkpoint.config import parse_config
from gptoss_export.exporter.checkpoint.synth import PRESETS, raw_config
from gptoss_export.exporter.checkpoint.tensors import Layout
from gptoss_export.exporter.graph.build import build_graph
from gptoss_export.exporter.graph.simplify import weightless_proto

config = parse_config(raw_config(PRESETS[sys.argv[1]], Layout.HF_MXFP4))
graph = build_graph(config, Layout.HF_MXFP4)
layer = sum((node.name or "").startswith("model.layers.0.") for node in graph.graph)
print(f"{config.num_layers} layers, {graph.graph.num_nodes()} nodes, {layer} a layer, "
      f"{len(weightless_proto(graph).SerializeToString())} bytes", file=sys.stderr)
"""


def main() -> None:
    for preset in sys.argv[1:] or ["20b", "120b"]:
        cost = run([Path(sys.executable), "-c", BUILD, preset])
        print(f"{machine()}; {preset}: {cost.seconds:.1f} s, peak RSS {cost.peak_rss / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
