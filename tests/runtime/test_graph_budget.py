"""The graph of a 120b fits where a laptop's browser does."""

import os
import subprocess
import sys

SCRIPT = """
from gptoss_export.exporter.checkpoint.config import parse_config
from gptoss_export.exporter.checkpoint.synth import PRESETS, raw_config
from gptoss_export.exporter.checkpoint.tensors import Layout
from gptoss_export.exporter.graph.build import build_graph

graph = build_graph(parse_config(raw_config(PRESETS["120b"], Layout.HF_MXFP4)), Layout.HF_MXFP4)
experts = [n for n in graph.graph if n.op_type == "MoEExperts"]
assert len(experts) == 36
assert list(experts[35].inputs[3].shape) == [128, 5760, 90, 16]
"""


def test_a_120b_graph_takes_seconds_and_little_memory() -> None:
    process = subprocess.Popen([sys.executable, "-c", SCRIPT])
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    assert usage.ru_maxrss * 1024 <= 1.5 * 2**30
    assert usage.ru_utime + usage.ru_stime <= 90
