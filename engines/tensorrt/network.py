"""TensorRT's network: parsed from ONNX, with the experts as plugins or not, and with the shapes it is built for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_export.engines.tensorrt import plugin
from gptoss_export.engines.tensorrt.cache import SMALLEST_CAPACITY, slots_for
from gptoss_export.engines.tensorrt.flavor import Flavor
from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.exporter.errors import EngineBuildError

if TYPE_CHECKING:
    from gptoss_export.engines.tensorrt.kernels.launch import MoEShape

PROFILES = ("decode", "prefill")
"""Profile 0 is for one token a row, profile 1 for prompts."""
PAST_PREFIX = "past_key_values."

NOT_LOWERED = "report this: the graph was not lowered for this engine"
REFUSED = "report this with the output of --debug; another flavor, or no plugin, may build"

_LONGEST_REASON = 600

_NO_DRIVER = re.compile(r"\[checkMacros\.cpp::catchCudaError::\d+\].*?\(cudaError 35: [^)]*\)\)?")

_Range = tuple[int, int, int]


def parse_network(
    trt: Any, builder: Any, path: Path, options: EngineOptions, flavor: Flavor, last_errors: Callable[[], str]
) -> tuple[Any, Any]:
    """The strongly typed network of an ONNX file, and the parser, which has to live as long as the network.

    last_errors: what TensorRT logged last. Raises EngineBuildError with the operator that TensorRT refuses.
    """
    # 11 and RTX are always strongly typed, whether or not they still have the flag.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, builder.logger)
    if options.plugin:
        # NVIDIA documents that a function body goes first without it; RTX 1.7.1 goes by the node's plugin_namespace.
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    # Maps external weights instead of reading them.
    if not parser.parse_from_file(str(path)):
        raise EngineBuildError(f"{flavor.title} refuses {_refused(parser, last_errors)}", REFUSED)
    return network, parser


def check_plugins(network: Any, wanted: int, shape: MoEShape | None) -> None:
    """Checks that the experts became what they should: `wanted` plugin layers, each with the inputs of `shape`.

    TensorRT falls back to a function body without a word. Raises EngineBuildError.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    layers = [layer for layer in layers if layer.type.name.startswith("PLUGIN")]
    if len(layers) != wanted:
        raise EngineBuildError(
            f"the network has {len(layers)} plugin layers where {wanted} are expected",
            "report this: the experts would not run as was asked for",
        )
    if shape is None:
        return
    for layer in layers:
        inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
        found = [(tensor.dtype.name, tuple(tensor.shape)) for tensor in inputs]
        if problem := plugin.input_problem(shape, found):
            raise EngineBuildError(f"experts {layer.name}: {problem}", NOT_LOWERED)


def allow_decomposition(trt: Any, network: Any) -> None:
    """Lets TensorRT compute attention from simpler operators where none of its attention kernels fits.

    By default the build fails there; with float32, for example, none fits. Where one fits, it is still used.
    """
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name == "ATTENTION_INPUT":
            layer.__class__ = trt.IAttentionInputLayer  # get_layer gives the base class; this is NVIDIA's own way down
            layer.attention.decomposable = True


def set_compute_capabilities(trt: Any, config: Any, options: EngineOptions, flavor: Flavor) -> None:
    """Names the GPUs of an RTX engine, if any were chosen. Raises EngineBuildError for those it cannot build for."""
    if not options.compute_capabilities:
        return
    if flavor.name != "rtx":
        raise EngineBuildError(
            f"{flavor.title} builds for the GPU of this host; compute capabilities can be chosen with TensorRT for RTX",
            "leave them out, or choose the flavor rtx",
        )
    kinds = {int(kind): kind for kind in trt.ComputeCapability.__members__.values()}
    known = {f"{number // 10}.{number % 10}": kind for number, kind in sorted(kinds.items()) if number >= 10}
    config.num_compute_capabilities = len(options.compute_capabilities)
    for index, name in enumerate(options.compute_capabilities):
        if name not in known or not config.set_compute_capability(known[name], index):
            raise EngineBuildError(
                f"{flavor.title} builds for no GPU of compute capability {name}",
                f"choose among {', '.join(known)}, or none of them for 8.0 and later; "
                "whether such an engine runs on H100 and H200 (9.0) is unknown",
            )


def add_profiles(builder: Any, config: Any, network: Any, options: EngineOptions) -> None:
    """Adds the profiles `PROFILES` to a builder's config; none where no input has a dynamic size.

    Raises EngineBuildError for dynamic inputs that are not the engine's.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    dynamic = {tensor.name: tuple(tensor.shape) for tensor in inputs if -1 in tuple(tensor.shape)}
    if not dynamic:
        return
    for name in PROFILES:
        profile = builder.create_optimization_profile()
        for tensor, shape in dynamic.items():
            ranges = _ranges(tensor, shape, options, decode=name == "decode")
            profile.set_shape(tensor, *(tuple(size[bound] for size in ranges) for bound in range(3)))
        if config.add_optimization_profile(profile) < 0:
            raise EngineBuildError(
                f"TensorRT refuses the shapes of the {name} profile",
                "choose other limits of batch, prompt, context and logits",
            )


def _ranges(name: str, shape: tuple[int, ...], options: EngineOptions, *, decode: bool) -> list[_Range]:
    """Least, usual and greatest size of each axis."""
    batch: _Range = (1, 1, options.max_batch)
    sequence: _Range = (1, 1, 1) if decode else (1, options.max_prompt, options.max_prompt)
    slots: _Range = (SMALLEST_CAPACITY, slots_for(options.max_context), slots_for(options.max_context))
    rows: _Range = (1, 1, options.max_batch if decode else options.max_logits)
    axes: dict[str, tuple[_Range | None, ...]] = {
        "input_ids": (batch, sequence),
        "query_positions": (batch, sequence),
        "key_positions": (batch, slots),
        "write_index": (batch,),
        "logit_rows": (rows,),
    }
    wanted = (batch, None, slots, None) if name.startswith(PAST_PREFIX) else axes.get(name, ())
    if len(wanted) != len(shape):
        raise EngineBuildError(
            f"the graph's input {name} has the shape {list(shape)}, for which there is no profile", NOT_LOWERED
        )
    chosen: list[_Range] = []
    for axis, size in zip(wanted, shape, strict=True):
        if size >= 0:
            chosen.append((size, size, size))
        elif axis is not None:
            chosen.append(axis)
        else:
            raise EngineBuildError(
                f"the graph's input {name} has the shape {list(shape)}, dynamic where it is fixed", NOT_LOWERED
            )
    return chosen


def one_line(text: str) -> str:
    """A message of TensorRT without line breaks, and without the complaint about a missing driver that it adds."""
    return " ".join(_NO_DRIVER.sub("", text).split())


def _refused(parser: Any, last_errors: Callable[[], str]) -> str:
    if not parser.num_errors:
        return f"the graph: {last_errors()}"
    error = parser.get_error(0)
    reason = one_line(error.desc())[:_LONGEST_REASON]
    if not error.node_operator():
        return f"the graph: {reason}"
    return f"{error.node_operator()} ({error.node_name() or f'node {error.node()}'}): {reason}"
