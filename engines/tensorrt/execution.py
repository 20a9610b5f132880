"""A deserialised engine: what it asks for, and contexts that run it.

    engine = load_engine(trt, folder, metadata)
    context = engine.context(PREFILL, stream, scratch)
    context.bind("input_ids", pointer, (1, 32))
    context.enqueue(stream)

Both packages are written for; where they differ, RTX has what is asked for by name here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from gptoss_export.engines.tensorrt.cache import slots_for
from gptoss_export.engines.tensorrt.cuda import ALIGNMENT, DeviceMemory, Stream, aligned
from gptoss_export.engines.tensorrt.metadata import ENGINE_NAME, EngineMetadata
from gptoss_export.engines.tensorrt.preflight import rebuild_command
from gptoss_export.exporter.errors import EngineMismatchError, SessionError
from gptoss_export.exporter.inside import open_inside

DECODE, PREFILL = 0, 1
"""The engine's profiles: one new column a row, or up to max_prompt."""

PAST, PRESENT = "past_key_values.", "present."
CALL_INPUTS = ("input_ids", "query_positions", "key_positions", "write_index", "logit_rows")
LOGITS = "logits"

_CACHE_TYPES = {"fp16": ("HALF", 2), "bf16": ("BF16", 2), "fp32": ("FLOAT", 4)}
_WEIGHT_TYPES = {"U8": "INT8", "I8": "INT8", "BF16": "BF16", "F16": "HALF", "F32": "FLOAT"}


@dataclass
class Log:
    """What TensorRT logged last as an error; it says no more by its return values than that it failed."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.lines = [*self.lines[-9:], " ".join(line.split())[:300]]

    @property
    def first(self) -> str:
        return self.lines[0] if self.lines else "TensorRT logged nothing"

    @property
    def last(self) -> str:
        return self.lines[-1] if self.lines else "TensorRT logged nothing"


@dataclass(frozen=True)
class Interface:
    """cache_names: past_key_values.N.key and .value of each layer in turn, tensors [B, kv_heads, slots, head_dim].

    item_bytes: of one of their elements.
    """

    cache_names: tuple[str, ...]
    kv_heads: int
    slots: int
    head_dim: int
    item_bytes: int
    vocab_size: int


@dataclass
class LoadedEngine:
    """An ICudaEngine whose interface is the one of `metadata`.

    scratch_bytes: device memory for the activations of any context; contexts may share it, as long as they take turns.
    check_plugins: raises what a plugin failed with. keep: what has to live as long as the engine.
    """

    engine: Any
    interface: Interface
    scratch_bytes: int
    log: Log
    configs: Mapping[int, Any]
    user_managed: Any
    check_plugins: Callable[[], None]
    keep: tuple[Any, ...]

    def context(self, profile: int, stream: Stream, scratch: DeviceMemory) -> Context:
        """A new context. Raises SessionError."""
        config = self.configs.get(profile, self.user_managed)
        return Context(self.engine.create_execution_context(config), profile, self, stream, scratch)

    def close(self) -> None:
        """Destroys the engine; its contexts have to be gone."""
        self.engine, self.configs, self.keep = None, {}, ()


class Context:
    """An IExecutionContext. Refusals are SessionErrors with what TensorRT logged, or the error that a plugin raised."""

    def __init__(self, context: Any, profile: int, engine: LoadedEngine, stream: Stream, scratch: DeviceMemory) -> None:
        self._log, self._check_plugins = engine.log, engine.check_plugins
        self._require(context is not None, "makes no execution context")
        self._context = context
        self._require(context.set_optimization_profile_async(profile, stream.handle), "does not take its own profile")
        context.set_device_memory(scratch.pointer, scratch.nbytes)

    def bind(self, name: str, pointer: int, shape: tuple[int, ...] | None = None) -> None:
        """Where a tensor lies; shape: of an input, where it varies."""
        if shape is not None:
            self._require(self._context.set_input_shape(name, shape), f"refuses {name} of shape {list(shape)}")
        self._require(self._context.set_tensor_address(name, pointer), f"refuses the address of {name}")

    def enqueue(self, stream: Stream) -> None:
        """Puts an execution into the stream."""
        self._require(self._context.execute_async_v3(stream.handle), "does not execute the engine")

    def can_capture(self, stream: Stream) -> bool:
        """Whether TensorRT says that an execution may be captured; a package that cannot say it is believed to."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(stream.handle))

    def _require(self, ok: object, what: str) -> None:
        # TensorRT goes on as if all were well after some failures of a plugin, and knows no reason for the others.
        self._check_plugins()
        if not ok:
            raise SessionError(
                f"TensorRT {what}: {self._log.last}", "run it again; if it stays, report it with the engine.json"
            )


def load_engine(trt: Any, folder: Path, metadata: EngineMetadata) -> LoadedEngine:
    """Deserialises engine.plan, which `preflight` has passed. Raises EngineMismatchError or what a plugin raises."""
    log = Log()
    logger = _logger(trt, log)
    check_plugins = _register_plugin(trt, logger) if metadata.plugin else _nothing
    runtime = trt.Runtime(logger)
    with open_inside(folder, ENGINE_NAME) as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
        check_plugins()
        if engine is None:
            reason = log.first  # what follows from it comes after it, and asking why logs more
            raise EngineMismatchError(
                f"TensorRT {metadata.version} does not load the engine{_why(trt, runtime, data)}: {reason}",
                f"rebuild it on this host: {rebuild_command(metadata)}",
            )
    interface = _interface(engine, metadata)
    configs, cache = _configs(trt, engine)
    return LoadedEngine(
        engine=engine,
        interface=interface,
        scratch_bytes=aligned(
            max(ALIGNMENT, *(int(engine.get_device_memory_size_for_profile_v2(i)) for i in (DECODE, PREFILL)))
        ),
        log=log,
        configs=configs,
        user_managed=trt.ExecutionContextAllocationStrategy.USER_MANAGED,
        check_plugins=check_plugins,
        keep=(logger, runtime, cache),
    )


def _register_plugin(trt: Any, logger: Any) -> Callable[[], None]:
    from gptoss_export.engines.tensorrt.plugin import register

    return register(trt, None, logger).require_no_failures


def _nothing() -> None:
    """An engine without plugins has none that could have failed."""


def _logger(trt: Any, log: Log) -> Any:
    severity = trt.ILogger.Severity
    grave = (severity.INTERNAL_ERROR, severity.ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in grave:
                log.add(msg)

    return Logger()


def _configs(trt: Any, engine: Any) -> tuple[dict[int, Any], Any]:
    """RTX compiles kernels for the GPU when they are first needed. Returns its settings, and what it has compiled.

    Decoding meets few shapes, many times: it waits for kernels made for them, which a capture needs. Prompts have any
    length: they run on the kernels that fit all lengths, since with the third way, which compiles in the background
    and then changes over, the same prompt would not give the same bits twice.
    """
    strategies = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
    if strategies is None or not hasattr(engine, "create_runtime_config"):
        return {}, None
    configs: dict[int, Any] = {}
    cache = None
    for profile, strategy in ((DECODE, strategies.EAGER), (PREFILL, strategies.NONE)):
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.dynamic_shapes_kernel_specialization_strategy = strategy
        if cache is None:
            cache = config.create_runtime_cache()
        config.set_runtime_cache(cache)
        configs[profile] = config
    return configs, cache


def _interface(engine: Any, metadata: EngineMetadata) -> Interface:
    """Checks the engine's tensors against engine.json and reads the rest off them. Raises EngineMismatchError."""
    tensors = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        tensors[name] = (engine.get_tensor_dtype(name).name, tuple(int(size) for size in engine.get_tensor_shape(name)))
    inputs = {name for name in tensors if engine.get_tensor_mode(name).name == "INPUT"}
    layers = sum(1 for name in tensors if name.startswith(PAST) and name.endswith(".key"))
    parts = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    expected = {*CALL_INPUTS, *metadata.inputs, *(PAST + part for part in parts)}
    outputs = {LOGITS, *(PRESENT + part for part in parts)}
    if not layers or inputs != expected or tensors.keys() != expected | outputs:
        odd = sorted((tensors.keys() | expected | outputs) - (tensors.keys() & (expected | outputs)))
        raise _mismatch(f"the engine and engine.json differ in {', '.join(odd[:3]) or 'what is input and output'}")
    for name, entry in metadata.inputs.items():
        if tensors[name] != (_WEIGHT_TYPES[entry.dtype], entry.shape):
            raise _mismatch(
                f"the engine takes {name} as {_shown(tensors[name])}, engine.json has {entry.dtype} {list(entry.shape)}"
            )
    for name in CALL_INPUTS:
        if tensors[name][0] != "INT64":
            raise _mismatch(f"the engine takes {name} as {_shown(tensors[name])}, not INT64")
    cache_type, item_bytes = _CACHE_TYPES[metadata.dtype]
    _, (_, kv_heads, _, head_dim) = tensors[f"{PAST}0.key"]
    slots = slots_for(metadata.max_context)
    for part in parts:
        for name in (PAST + part, PRESENT + part):
            dtype, shape = tensors[name]
            if (dtype, shape[1:]) != (cache_type, (kv_heads, slots, head_dim)):
                raise _mismatch(f"the engine has {name} as {_shown(tensors[name])}, for a text of {slots} slots")
    dtype, shape = tensors[LOGITS]
    if dtype != "FLOAT" or len(shape) != 2 or shape[1] < 1:
        raise _mismatch(f"the engine gives logits as {_shown(tensors[LOGITS])}")
    if engine.num_optimization_profiles != len((DECODE, PREFILL)):
        raise _mismatch(f"the engine has {engine.num_optimization_profiles} profiles")
    return Interface(tuple(PAST + part for part in parts), kv_heads, slots, head_dim, item_bytes, shape[1])


def _why(trt: Any, runtime: Any, data: mmap) -> str:
    """RTX can say why an engine is not valid here."""
    if not hasattr(runtime, "get_engine_validity"):
        return ""
    _, diagnostics = runtime.get_engine_validity(data)
    reasons = trt.EngineInvalidityDiagnostics.__members__.items()
    found = [name.lower().replace("_", " ") for name, bit in reasons if int(diagnostics) & int(bit)]
    return f" ({', '.join(found)})" if found else ""


def _shown(tensor: tuple[str, tuple[int, ...]]) -> str:
    return f"{tensor[0]} {list(tensor[1])}"


def _mismatch(what: str) -> EngineMismatchError:
    return EngineMismatchError(what, "export again: engine.plan and engine.json were not made together")
