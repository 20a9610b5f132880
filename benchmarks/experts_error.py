"""MoEExperts of the installed kernel library against float64, at 20b's shape (hidden 2880, 32 experts of 2880, top-4).

    python benchmarks/experts_error.py /fast/disk

Makes random-20b-2 (3.3 GB) in the folder where it is not there. Prints the relative RMS error of every layer for 1, 4
and 64 tokens, and exits with 1 when one is above the limit. The op runs in ONNX Runtime on the checkpoint's own files;
the float64 side decodes one expert at a time from the same bytes. Takes half a minute.

Activations have 16 bits below the largest of each 32, so the error grows with how far that one stands out. The limit is
for inputs as the random network makes them (embeddings of random tokens, normed), whose groups peak 2.4 times above the
RMS, as normal values and those of the small trained checkpoint do. `outliers` is without limit: a few channels are so
large that the peaks are 5.2 times the RMS; more than sqrt(32) = 5.7 no input can have.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from measure import machine, run
from numpy.typing import NDArray

from gptoss_export.engines.ort.library import kernel_library, kernels_work
from gptoss_export.exporter.checkpoint.mxfp4 import decode
from gptoss_export.exporter.checkpoint.open import open_checkpoint, read_tensor
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.graph.assemble import IR_VERSION
from gptoss_export.exporter.graph.bind import bind
from gptoss_export.exporter.ops import DOMAIN, OPSET, VERSION

GPTOSS = Path(sys.executable).parent / "gptoss-export"
LIMITS = {"embeddings": 5e-5, "outliers": np.inf}
TOKENS = (1, 4, 64)
OPERANDS = tuple(f"mlp.experts.{m}_proj_{part}" for m in ("gate_up", "down") for part in ("blocks", "scales", "bias"))

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Routed:
    """What the experts of a layer are given. x [T, hidden] and weights [T, top_k] float32, experts [T, top_k] int64."""

    inputs: str
    x: Float32
    weights: Float32
    experts: NDArray[np.int64]

    @property
    def feeds(self) -> dict[str, NDArray[Any]]:
        return {"x": self.x, "weights": self.weights, "experts": self.experts}


def routed(checkpoint: Checkpoint, layer: int) -> Iterator[Routed]:
    """Normed hidden states and the layer's own routing of them, without and with outliers."""
    config, rng = checkpoint.config, np.random.default_rng(layer)
    norm, router, bias = (
        read_tensor(checkpoint.tensors[f"model.layers.{layer}.{name}"]).astype(np.float64)
        for name in ("post_attention_layernorm.weight", "mlp.router.weight", "mlp.router.bias")
    )
    outliers = np.ones(config.hidden_size)
    outliers[rng.permutation(config.hidden_size)[:8]] = 50
    kinds = {"embeddings": np.ones(config.hidden_size), "outliers": outliers}
    embedding = read_tensor(checkpoint.tensors["model.embed_tokens.weight"])
    for inputs, factors in kinds.items():
        for count in TOKENS:
            hidden = embedding[rng.integers(0, config.vocab_size, count)].astype(np.float64) * factors
            normed = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + config.rms_norm_eps) * norm
            logits = normed @ router.T + bias
            experts = np.argsort(-logits, axis=-1, kind="stable")[:, : config.top_k]
            odds = np.exp(np.take_along_axis(logits, experts, -1) - logits.max(-1, keepdims=True))
            weights = odds / odds.sum(-1, keepdims=True)
            yield Routed(inputs, normed.astype(np.float32), weights.astype(np.float32), experts)


def open_layer(checkpoint: Checkpoint, layer: int) -> ort.InferenceSession:
    """A session on one MoEExperts, without a function body, whose weights are byte ranges of the checkpoint's files."""
    config = checkpoint.config
    floats, ids = ir.DataType.FLOAT, ir.DataType.INT64
    x = ir.val("x", floats, ("tokens", config.hidden_size))
    weights, experts = ir.val("weights", floats, ("tokens", None)), ir.val("experts", ids, ("tokens", None))
    tensors = {name: checkpoint.tensors[name] for name in (f"model.layers.{layer}.{o}" for o in OPERANDS)}
    types = {"BF16": ir.DataType.BFLOAT16, "U8": ir.DataType.UINT8}
    operands = [ir.val(name, types[tensor.dtype], tensor.shape) for name, tensor in tensors.items()]
    swiglu = {"swiglu_alpha": config.swiglu_alpha, "swiglu_limit": config.swiglu_limit}
    node = ir.node("MoEExperts", [x, weights, experts, *operands], swiglu, domain=DOMAIN)
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", floats, x.shape
    graph = ir.Graph(
        [x, weights, experts],
        node.outputs,
        nodes=[node],
        initializers=operands,
        opset_imports={"": OPSET, DOMAIN: VERSION},
        name="experts",
    )
    model = ir.Model(graph, ir_version=IR_VERSION)
    bind(model, {"": tensors})
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(kernel_library()))
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(checkpoint.root))
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def experts_float64(checkpoint: Checkpoint, layer: int, cases: list[Routed]) -> list[Float64]:
    """The definition (see `exporter.ops.moe_experts`) in float64, [T, hidden] a case; an expert is decoded once."""
    config = checkpoint.config
    stored = [read_tensor(checkpoint.tensors[f"model.layers.{layer}.{name}"]) for name in OPERANDS]
    results = [np.zeros(case.x.shape) for case in cases]
    for e in range(config.num_experts):
        up_blocks, up_scales, up_bias, down_blocks, down_scales, down_bias = (operand[e] for operand in stored)
        up, down = (decode(*m).astype(np.float64) for m in ((up_blocks, up_scales), (down_blocks, down_scales)))
        for case, y in zip(cases, results, strict=True):
            tokens, places = np.nonzero(case.experts == e)
            h = case.x[tokens].astype(np.float64) @ up.T + up_bias.astype(np.float64)
            gate = np.minimum(h[:, 0::2], config.swiglu_limit)
            linear = np.clip(h[:, 1::2], -config.swiglu_limit, config.swiglu_limit) + 1
            a = gate / (1 + np.exp(-config.swiglu_alpha * gate)) * linear
            # An expert is chosen once a token at most, so no row is added to twice.
            y[tokens] += case.weights[tokens, places, None] * (a @ down.T + down_bias.astype(np.float64))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder / "random-20b-2"
    if (why_not := kernels_work()) is not None:
        sys.exit(why_not)
    if not folder.exists():
        run([GPTOSS, "synth", folder, "--preset", "20b", "--layers", "2"])
    checkpoint = open_checkpoint(folder)
    print(f"{machine()}; instruction set: {os.environ.get('GPTOSS_EXPORT_ISA') or 'the best one here'}\n")
    print("| layer | inputs | tokens | relative RMS | limit |\n|---|---|---|---|---|")
    failed = False
    for layer in range(checkpoint.config.num_layers):
        session = open_layer(checkpoint, layer)
        cases = list(routed(checkpoint, layer))
        for case, expected in zip(cases, experts_float64(checkpoint, layer, cases), strict=True):
            (y,) = session.run(None, case.feeds)
            error = float(np.sqrt(((y - expected) ** 2).sum() / (expected**2).sum()))
            limit = LIMITS[case.inputs]
            failed |= not (np.isfinite(error) and error <= limit)
            shown = f"{limit:.0e}" if np.isfinite(limit) else "none"
            print(f"| {layer} | {case.inputs} | {len(case.x)} | {error:.2e} | {shown} |", flush=True)
    if failed:
        sys.exit("above the limit")


if __name__ == "__main__":
    main()
