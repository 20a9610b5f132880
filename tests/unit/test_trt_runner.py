# ruff: noqa: N802, N815 - the driver's own names
"""The runner on a GPU that is not there: a CUDA driver in host memory and an engine in numpy, both unforgiving.

Work in a stream is done when somebody waits for it, so host memory that is written too early shows. New memory holds
NaN, every address is checked against what is allocated, and an execution outside of the profiles fails.
"""

from __future__ import annotations

import ctypes
import enum
import gc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from gptoss_export.engines.tensorrt import slots as slots_module
from gptoss_export.engines.tensorrt import steps, upload
from gptoss_export.engines.tensorrt.cache import slots_for
from gptoss_export.engines.tensorrt.cuda import Device
from gptoss_export.engines.tensorrt.metadata import EngineInput, EngineMetadata
from gptoss_export.engines.tensorrt.run import TensorRTRunner
from gptoss_export.exporter.errors import (
    EngineMismatchError,
    IntegrityError,
    OutOfMemoryError,
    PromptError,
    SessionError,
    TargetUnavailableError,
)
from gptoss_export.validators.scenario_run import run_scenarios
from gptoss_export.validators.scenarios import SCENARIOS

VOCAB, HEADS, DIM, WINDOWS = 23, 2, 4, (16, 0)
WIDTH = HEADS * DIM
_RNG = np.random.default_rng(0)
EMBED = _RNG.standard_normal((VOCAB, WIDTH)).astype(ml_dtypes.bfloat16)
SCALES = _RNG.integers(1, 4, VOCAB).astype(np.uint8)
QUERY, KEY, VALUE = (_RNG.standard_normal((len(WINDOWS), VOCAB, WIDTH)) for _ in range(3))
TURN = _RNG.standard_normal((512, WIDTH))
DTYPES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class Driver:
    """cuda.bindings.driver, as much of it as is used."""

    CUresult = Result
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major", CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor"
    )
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self, total: int = 1 << 30) -> None:
        self.total = total
        self.blocks = {"device": {}, "host": {}}
        self.queues: dict[int, list] = {}
        self.captures: dict[int, list | None] = {}
        self.graphs: dict[int, list] = {}
        self.retained = 0
        self.counts: Counter[str] = Counter()
        self.sticky: Result | None = None
        self._next = 1

    @property
    def used(self) -> int:
        return sum(size for _, size in self.blocks["device"].values())

    @property
    def live(self) -> int:
        """Everything that somebody has to free."""
        return sum(map(len, (*self.blocks.values(), self.queues, self.graphs))) + self.retained

    def handle(self) -> int:
        self._next += 1
        return self._next

    def read(self, pointer: int, nbytes: int, kind: str = "device") -> np.ndarray:
        """Live memory as bytes, a view. Raises MemoryError for an address that was not allocated."""
        for base, (block, size) in self.blocks[kind].items():
            if base <= pointer and pointer + nbytes <= base + size:
                at = pointer - ctypes.addressof(block)
                return np.frombuffer(block, np.uint8)[at : at + nbytes]
        raise MemoryError(f"{nbytes} bytes at {pointer} are nobody's")

    def put(self, stream: int, work) -> tuple[Result]:
        if self.captures.get(stream) is not None:
            self.captures[stream].append(work)
        else:
            self.queues[stream].append(work)
        return (Result.CUDA_SUCCESS,)

    def run(self, stream: int) -> Result:
        queue, self.queues[stream] = self.queues[stream], []
        for work in queue:
            try:
                work()
            except MemoryError:
                return Result.CUDA_ERROR_ILLEGAL_ADDRESS
        return Result.CUDA_SUCCESS

    def cuInit(self, flags):
        return (Result.CUDA_SUCCESS,)

    def cuDeviceGet(self, ordinal):
        return Result.CUDA_SUCCESS, ordinal

    def cuDevicePrimaryCtxRetain(self, device):
        self.retained += 1
        return Result.CUDA_SUCCESS, "context"

    def cuDevicePrimaryCtxRelease(self, device):
        self.retained -= 1
        return (Result.CUDA_SUCCESS,)

    def cuCtxSetCurrent(self, context):
        return (Result.CUDA_SUCCESS,)

    def cuDeviceGetAttribute(self, which, device):
        return Result.CUDA_SUCCESS, {"major": 8, "minor": 9}[which]

    def cuDeviceGetName(self, length, device):
        return Result.CUDA_SUCCESS, b"Paper GPU\0\0\0"

    def cuMemGetInfo(self):
        return Result.CUDA_SUCCESS, self.total - self.used, self.total

    def cuGetErrorName(self, result):
        return Result.CUDA_SUCCESS, result.name.encode()

    def _allocate(self, kind, nbytes):
        # NaN in every float type.
        block = ctypes.create_string_buffer(b"\xff" * (nbytes + 256), nbytes + 256)
        pointer = -(-ctypes.addressof(block) // 256) * 256
        self.blocks[kind][pointer] = (block, nbytes)
        return Result.CUDA_SUCCESS, pointer

    def cuMemAlloc(self, nbytes):
        if self.used + nbytes > self.total:
            return Result.CUDA_ERROR_OUT_OF_MEMORY, 0
        return self._allocate("device", nbytes)

    def cuMemAllocHost(self, nbytes):
        return self._allocate("host", nbytes)

    def cuMemFree(self, pointer):
        for stream in self.queues:
            self.run(stream)
        del self.blocks["device"][pointer]
        return (Result.CUDA_SUCCESS,)

    def cuMemFreeHost(self, pointer):
        del self.blocks["host"][pointer]
        return (Result.CUDA_SUCCESS,)

    def cuStreamCreate(self, flags):
        stream = self.handle()
        self.queues[stream] = []
        return Result.CUDA_SUCCESS, stream

    def cuStreamDestroy(self, stream):
        del self.queues[stream]
        return (Result.CUDA_SUCCESS,)

    def cuStreamSynchronize(self, stream):
        assert self.captures.get(stream) is None
        self.sticky = self.sticky or self.run(stream)
        return (self.sticky,)

    def cuMemcpyHtoDAsync(self, target, source, nbytes, stream):
        if not target:
            return (Result.CUDA_ERROR_INVALID_VALUE,)

        def copy():
            self.read(target, nbytes)[:] = self.read(source, nbytes, "host")

        return self.put(stream, copy)

    def cuMemcpyDtoHAsync(self, target, source, nbytes, stream):
        def copy():
            self.read(target, nbytes, "host")[:] = self.read(source, nbytes)

        return self.put(stream, copy)

    def cuMemsetD8Async(self, target, byte, nbytes, stream):
        def fill():
            self.read(target, nbytes)[:] = byte

        return self.put(stream, fill)

    def cuStreamBeginCapture(self, stream, mode):
        self.captures[stream] = []
        return (Result.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, stream):
        captured = self.captures.pop(stream)
        if self.counts["invalidated"]:
            return Result.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        graph = self.handle()
        self.graphs[graph] = captured
        self.counts["captures"] += 1
        return Result.CUDA_SUCCESS, graph

    def cuGraphInstantiate(self, graph, flags):
        executable = self.handle()
        self.graphs[executable] = self.graphs[graph]
        return Result.CUDA_SUCCESS, executable

    def cuGraphDestroy(self, graph):
        del self.graphs[graph]
        return (Result.CUDA_SUCCESS,)

    cuGraphExecDestroy = cuGraphDestroy

    def cuGraphLaunch(self, graph, stream):
        self.counts["launches"] += 1
        for work in self.graphs[graph]:
            self.put(stream, work)
        return (Result.CUDA_SUCCESS,)


def attend(query, keys, values, seen):
    """A head: softmax over what is seen and slot 0, the sink, whose key and value are zero."""
    scores = np.where(seen, keys @ query, -np.inf)
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum()) @ values


def text_logits(ids, dtype):
    """The network on a text without padding, cache or slots."""
    at, places = TURN[: len(ids)], np.arange(-1, len(ids))
    x = EMBED.astype(float)[ids] * at
    for layer, window in enumerate(WINDOWS):
        zero = np.zeros((1, WIDTH))
        keys, values = (
            np.concatenate([zero, (table[layer][ids] * at).astype(DTYPES[dtype]).astype(float)])
            for table in (KEY, VALUE)
        )
        y = np.empty_like(x)
        for i in range(len(ids)):
            seen = (places < 0) | ((places <= i) & ((i - places < window) | (window == 0)))
            for head in range(HEADS):
                part = slice(head * DIM, (head + 1) * DIM)
                y[i, part] = attend((QUERY[layer][ids[i]] * at[i])[part], keys[:, part], values[:, part], seen)
        x = x + y
    return (x @ EMBED.astype(float).T * SCALES).astype(np.float32)


class ExecutionContext:
    def __init__(self, engine) -> None:
        self.engine, self.profile, self.shapes, self.addresses, self.plain = engine, None, {}, {}, None
        self.scratch = None

    def set_optimization_profile_async(self, profile, stream):
        self.profile = profile
        return True

    def set_device_memory(self, pointer, nbytes):
        assert (nbytes >= 1000 and pointer % 256 == 0) or nbytes >= 1000
        self.scratch = (pointer, nbytes)

    def set_input_shape(self, name, shape):
        if name in self.engine.refuses:
            self.engine.logger.log(Severity.ERROR, f"no {name}\n here")
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, pointer):
        assert name in self.engine.tensors
        assert pointer % 256 == 0
        self.addresses[name] = pointer
        return True

    def is_stream_capturable(self, stream):
        return self.engine.capturable

    def execute_async_v3(self, stream):
        driver, m = self.engine.driver, self.engine.metadata
        assert self.scratch is not None
        assert self.addresses.keys() == self.engine.tensors.keys()
        B, S = self.shapes["input_ids"]
        _, C = self.shapes["key_positions"]
        (R,) = self.shapes["logit_rows"]
        cache = (B, HEADS, slots_for(m.max_context), DIM)
        for name in self.engine.tensors:
            if name.startswith("past_key_values."):
                assert self.shapes[name] == cache
                assert self.addresses[name] == self.addresses[name.replace("past_key_values.", "present.")]
        assert self.shapes["query_positions"] == (B, S)
        assert self.shapes["write_index"] == (B,)
        assert 1 <= B <= m.max_batch and 2 <= C <= slots_for(m.max_context)
        assert (S == 1 and m.max_batch >= R) if self.profile == 0 else (m.max_prompt >= S and m.max_logits >= R)
        if driver.captures.get(stream) is None:
            self.plain = dict(self.shapes)
        else:
            assert self.plain == self.shapes, "captured before a plain execution of these shapes"
            if self.engine.spoils_captures:
                driver.counts["invalidated"] += 1
                return False
        self.engine.executions.append((self.profile, B, S, C, R, driver.captures.get(stream) is not None))
        addresses = dict(self.addresses)
        driver.put(stream, lambda: self.engine.compute(addresses, B, S, C, R))
        return True


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    INFO = 3


class Engine:
    """An ICudaEngine of the network of `text_logits`."""

    num_optimization_profiles = 2

    def __init__(self, driver, metadata, logger) -> None:
        self.driver, self.metadata, self.logger = driver, metadata, logger
        self.refuses, self.capturable, self.spoils_captures = set(), True, False
        self.executions: list[tuple] = []
        self.contexts: list[object] = []
        cache = (
            {"fp16": "HALF", "bf16": "BF16", "fp32": "FLOAT"}[metadata.dtype],
            (-1, HEADS, slots_for(metadata.max_context), DIM),
        )
        self.tensors = {
            "input_ids": ("INT64", (-1, -1)),
            "query_positions": ("INT64", (-1, -1)),
            "key_positions": ("INT64", (-1, -1)),
            "write_index": ("INT64", (-1,)),
            "logit_rows": ("INT64", (-1,)),
            "model.embed_tokens.weight": ("BF16", (VOCAB, WIDTH)),
            "scales": ("INT8", (VOCAB,)),
            "logits": ("FLOAT", (-1, VOCAB)),
        }
        for layer in range(len(WINDOWS)):
            for part in ("key", "value"):
                self.tensors[f"past_key_values.{layer}.{part}"] = self.tensors[f"present.{layer}.{part}"] = cache

    @property
    def num_io_tensors(self):
        return len(self.tensors)

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=self.tensors[name][0])

    def get_tensor_shape(self, name):
        return self.tensors[name][1]

    def get_tensor_mode(self, name):
        return SimpleNamespace(name="OUTPUT" if name == "logits" or name.startswith("present.") else "INPUT")

    def get_device_memory_size_for_profile_v2(self, profile):
        return (700, 1000)[profile]

    def create_execution_context(self, how):
        self.contexts.append(how)
        return ExecutionContext(self)

    def compute(self, address, B, S, C, R):
        def tensor(name, dtype, shape):
            count = int(np.prod(shape))
            return self.driver.read(address[name], count * np.dtype(dtype).itemsize).view(dtype).reshape(shape)

        dtype = DTYPES[self.metadata.dtype]
        ids, at = (tensor(name, np.int64, (B, S)) for name in ("input_ids", "query_positions"))
        k = tensor("key_positions", np.int64, (B, C))
        write = tensor("write_index", np.int64, (B,))
        assert (k[:, 0] == -2).all()
        embed = tensor("model.embed_tokens.weight", ml_dtypes.bfloat16, (VOCAB, WIDTH)).astype(float)
        turn = TURN[np.maximum(at, 0)]
        x = embed[ids] * turn
        for layer, window in enumerate(WINDOWS):
            keys, values = (
                tensor(f"past_key_values.{layer}.{part}", dtype, (B, HEADS, slots_for(self.metadata.max_context), DIM))
                for part in ("key", "value")
            )
            for row in range(B):
                place = slice(write[row], write[row] + S)
                for cache, table in ((keys, KEY), (values, VALUE)):
                    new = (table[layer][ids[row]] * turn[row]).reshape(S, HEADS, DIM)
                    cache[row, :, place] = new.transpose(1, 0, 2)
            y = np.empty_like(x)
            for row, s, head in np.ndindex(B, S, HEADS):
                q = at[row, s]
                seen = (k[row] == -2) | ((k[row] >= 0) & (k[row] <= q) & ((q - k[row] < window) | (window == 0)))
                part = slice(head * DIM, (head + 1) * DIM)
                query = (QUERY[layer][ids[row, s]] * turn[row, s])[part]
                y[row, s, part] = attend(
                    query, keys[row, head, :C].astype(float), values[row, head, :C].astype(float), seen
                )
            x = x + y
        rows = x.reshape(-1, WIDTH)[tensor("logit_rows", np.int64, (R,))]
        tensor("logits", np.float32, (R, VOCAB))[:] = rows @ embed.T * tensor("scales", np.uint8, (VOCAB,))


class ILogger:
    pass


ILogger.Severity = Severity


def make_trt(driver, metadata, *, rtx: bool = True):
    """The module tensorrt_rtx, or with rtx=False what `tensorrt` has of it."""
    made = []

    class Runtime:
        def __init__(self, logger) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data):
            if bytes(data[:6]) != b"engine":
                self.logger.log(Severity.INFO, "Loaded engine size: 0 MiB")
                self.logger.log(Severity.ERROR, "Serialization assertion failed\nin parsePlan")
                self.logger.log(Severity.ERROR, "what follows from it")
                self.logger.log(Severity.INFO, "bye")
                return None
            made.append(Engine(driver, metadata, self.logger))
            made[-1].tensors |= trt.tensors
            if rtx:
                made[-1].create_runtime_config = RuntimeConfig
            return made[-1]

    class RuntimeConfig:
        caches = 0

        def set_execution_context_allocation_strategy(self, strategy):
            self.allocation = strategy

        def create_runtime_cache(self):
            RuntimeConfig.caches += 1
            return object()

        def set_runtime_cache(self, cache):
            self.cache = cache

    trt = SimpleNamespace(
        __version__="1.7.1.116",
        ILogger=ILogger,
        Runtime=Runtime,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
        engines=made,
        tensors={},
        config=RuntimeConfig,
    )
    if rtx:
        trt.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager", LAZY="lazy", NONE="none")
        trt.EngineInvalidityDiagnostics = enum.IntFlag("Why", {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2})
        Runtime.get_engine_validity = lambda self, data: ("INVALID", 2)
    return trt


class Bed:
    """A folder with an engine, a device and a module, and runners on them."""

    def __init__(self, folder: Path, *, total: int = 1 << 30, rtx: bool = True, **limits) -> None:
        self.folder, self.driver = folder, Driver(total)
        (folder / "weights").mkdir(exist_ok=True)
        (folder / "engine.plan").write_bytes(b"engine")
        (folder / "weights" / "a").write_bytes(b"?" * 7 + SCALES.tobytes() + b"?" + EMBED.tobytes() + b"?")
        sizes = {"max_batch": 3, "max_prompt": 64, "max_context": 300, "max_logits": 40} | limits
        self.metadata = EngineMetadata(
            flavor="rtx" if rtx else "tensorrt",
            version="1.7.1.116",
            compute_capabilities=("8.0+",),
            dtype=sizes.pop("dtype", "fp32"),
            engine_weights="external",
            plugin=False,
            engine_sha256="0" * 64,
            inputs={
                "model.embed_tokens.weight": EngineInput(
                    "weights/a", "BF16", (VOCAB, WIDTH), 8 + VOCAB, 2 * VOCAB * WIDTH
                ),
                "scales": EngineInput("weights/a", "U8", (VOCAB,), 7, VOCAB),
            },
            **sizes,
        )
        self.trt = make_trt(self.driver, self.metadata, rtx=rtx)

    def runner(self, **options) -> TensorRTRunner:
        device = Device(self.driver)
        return TensorRTRunner(self.trt, self.folder, self.metadata, device, **options)

    @property
    def engine(self) -> Engine:
        return self.trt.engines[-1]


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return Bed(tmp_path)


class Texts:
    """What `validators.parity.measure` asks of a reference."""

    vocab_size = VOCAB
    config = SimpleNamespace(sliding_window=WINDOWS[0])

    def __init__(self, lengths, dtype) -> None:
        self.probes = [SimpleNamespace(ids=np.random.default_rng(1).integers(0, VOCAB, n)) for n in lengths]
        self._logits = [text_logits(probe.ids, dtype) for probe in self.probes]

    def logits(self, probe, start, stop):
        return self._logits[probe][start:stop]


def decode(runner, ids, cache=None):
    """Feeds a row of ids one by one; logits [n, V] and the cache."""
    logits = []
    for token in ids:
        step = runner.forward(np.array([[token]]), None, cache, 1)
        cache = step.cache
        logits.append(step.logits[0, 0])
    return np.stack(logits), cache


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"dtype": "fp16"},
        {"dtype": "bf16"},
        {"max_prompt": 7, "max_logits": 5},
        {"max_prompt": 1, "max_logits": 3},
        {"rtx": False},
    ],
    ids=["fp32", "fp16", "bf16", "chunks", "one-by-one", "tensorrt"],
)
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "plain"])
def test_every_scenario_of_parity_is_the_text(tmp_path: Path, limits: dict, cuda_graphs: bool) -> None:
    bed = Bed(tmp_path, **limits)
    with bed.runner(cuda_graphs=cuda_graphs) as runner:
        results = run_scenarios(runner, Texts((61, 40, 52, 1), bed.metadata.dtype), effort="quick").accumulators
    assert list(results) == list(SCENARIOS)
    for result in results.values():
        assert result.metrics().non_finite == 0
        assert result.metrics().logit_diff_max < 2e-4, result
    assert (bed.driver.counts["launches"] > 0) is cuda_graphs
    assert bed.driver.live == 0


def test_a_text_goes_through_all_sizes_and_stays_itself(bed: Bed) -> None:
    ids = np.random.default_rng(2).integers(0, VOCAB, 300)
    expected = text_logits(ids, "fp32")
    with bed.runner() as runner:
        first = runner.forward(ids[None, :120], keep=0)
        np.testing.assert_allclose(first.logits[0], expected[:120], atol=2e-4)
        logits, cache = decode(runner, ids[120:], first.cache)
        np.testing.assert_allclose(logits, expected[120:], atol=2e-4)
        assert cache.length == 300
        with pytest.raises(PromptError, match="301 positions"):
            runner.forward(ids[None, :1], None, cache, 1)
    assert {capacity for _, _, _, capacity, _, _ in bed.engine.executions} == {128, 256, 384}
    assert bed.driver.counts["captures"] == 3


def test_a_graph_is_captured_once_for_a_size_not_once_for_a_text(bed: Bed) -> None:
    ids = np.random.default_rng(3).integers(0, VOCAB, (4, 20))
    with bed.runner() as runner:
        for text in ids:
            logits, cache = decode(runner, text)
            np.testing.assert_allclose(logits, text_logits(text, "fp32"), atol=2e-4)
            del cache
        assert runner.graphs_refused is None
    assert bed.driver.counts["captures"] == 1
    assert bed.driver.counts["launches"] == 4 * 20 - 1, "all but the first step"
    assert Counter(captured for *_, captured in bed.engine.executions) == {False: 1, True: 1}


def test_two_texts_at_a_time_do_not_meet(bed: Bed) -> None:
    ids = np.random.default_rng(4).integers(0, VOCAB, (2, 12))
    with bed.runner() as runner:
        caches, logits = [None, None], [[], []]
        for column in range(12):
            for text in (0, 1):
                step = runner.forward(ids[text : text + 1, column : column + 1], None, caches[text], 1)
                caches[text] = step.cache
                logits[text].append(step.logits[0, 0])
        for text in (0, 1):
            np.testing.assert_allclose(logits[text], text_logits(ids[text], "fp32"), atol=2e-4)
    assert bed.driver.counts["captures"] == 2


@pytest.mark.parametrize("how", ["spoiled", "not ready"])
def test_decoding_goes_on_where_a_capture_fails(bed: Bed, how: str) -> None:
    ids = np.random.default_rng(5).integers(0, VOCAB, 9)
    with bed.runner() as runner:
        bed.engine.spoils_captures, bed.engine.capturable = how == "spoiled", how != "not ready"
        logits, _ = decode(runner, ids)
        np.testing.assert_allclose(logits, text_logits(ids, "fp32"), atol=2e-4)
        assert bed.driver.counts["launches"] == 0
        # What was refused is not tried again; what was not ready may be later.
        assert bed.driver.counts["invalidated"] == (how == "spoiled")
        assert (runner.graphs_refused is not None) is (how == "spoiled")
        bed.engine.capturable = True
        decode(runner, ids)
        assert (bed.driver.counts["launches"] > 0) is (how == "not ready")


def test_profiles_contexts_and_what_rtx_is_told(bed: Bed) -> None:
    ids = np.zeros((2, 5), np.int64)
    with bed.runner() as runner:
        step = runner.forward(ids, keep=2)
        step = runner.forward(ids[:, :1], None, step.cache, 1)
        runner.forward(ids[:, :1], None, step.cache, 1)
        runner.forward(ids, keep=1)
    assert [e[:5] for e in bed.engine.executions] == [
        (1, 2, 5, 128, 4), (0, 2, 1, 128, 2), (0, 2, 1, 128, 2), (1, 2, 5, 128, 2),
    ]  # fmt: skip
    prefill, decoding = bed.engine.contexts
    assert prefill.dynamic_shapes_kernel_specialization_strategy == "none"
    assert decoding.dynamic_shapes_kernel_specialization_strategy == "eager"
    assert prefill.allocation == decoding.allocation == "user"
    assert prefill.cache is decoding.cache, "compiled once for all contexts"


def test_tensorrt_makes_contexts_without_the_settings_of_rtx(tmp_path: Path) -> None:
    bed = Bed(tmp_path, rtx=False)
    with bed.runner() as runner:
        runner.forward(np.zeros((1, 3), np.int64))
    assert bed.engine.contexts == ["user"]


def test_a_cache_is_continued_once(bed: Bed) -> None:
    ids = np.zeros((1, 4), np.int64)
    with bed.runner() as runner, bed.runner() as other:
        first = runner.forward(ids)
        with pytest.raises(PromptError, match="batch"):
            runner.forward(np.zeros((2, 1), np.int64), None, first.cache, 1)
        with pytest.raises(PromptError, match="another runner"):
            other.forward(ids, None, first.cache, 1)
        with pytest.raises(PromptError, match="not in the vocabulary"):
            runner.forward(ids + VOCAB, None, first.cache, 1)
        with pytest.raises(PromptError, match="batch of 4"):
            runner.forward(np.zeros((4, 1), np.int64))
        second = runner.forward(ids, None, first.cache, 1)
        assert second.cache.length == 8, "what was refused has not spoiled it"
        with pytest.raises(PromptError, match="continued already"):
            runner.forward(ids, None, first.cache, 1)


def test_logits_outlive_the_next_call_and_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "STAGING_BYTES", 1)
    bed = Bed(tmp_path, max_batch=1, max_prompt=37, max_context=37)
    ids = np.random.default_rng(6).integers(0, VOCAB, (1, 37))
    with bed.runner() as runner:
        assert max(size for _, size in bed.driver.blocks["host"].values()) < 37 * 4 * VOCAB
        step = runner.forward(ids, keep=0)
        runner.forward(ids[:, ::-1], keep=0)
    np.testing.assert_allclose(step.logits[0], text_logits(ids[0], "fp32"), atol=2e-4)


def test_the_largest_call_of_all_fits(bed: Bed) -> None:
    ids = np.random.default_rng(8).integers(0, VOCAB, (3, 300))
    with bed.runner() as runner:
        cache = None
        for begin in range(0, 256, 64):
            step = runner.forward(ids[:, begin : begin + 64], None, cache, 13)
            cache = step.cache
    assert bed.engine.executions[-1][:5] == (1, 3, 64, 384, 39)
    for row in range(3):
        np.testing.assert_allclose(step.logits[row], text_logits(ids[row, :256], "fp32")[-13:], atol=2e-4)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_weights_arrive_whole_in_chunks_of_any_size(bed: Bed, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(upload, "CHUNK_BYTES", chunk)
    device = Device(bed.driver)
    weights = upload.upload_weights(bed.folder, bed.metadata, device)
    for name, array in (("model.embed_tokens.weight", EMBED), ("scales", SCALES)):
        assert bytes(bed.driver.read(weights[name].pointer, array.nbytes)) == array.tobytes()
    assert not bed.driver.blocks["host"], "pinned memory is given back"


def test_a_weights_file_that_ends_too_early_is_named(bed: Bed) -> None:
    path = bed.folder / "weights" / "a"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(IntegrityError, match="weights/a has 398 bytes"):
        bed.runner()
    gc.collect()
    assert bed.driver.live == 0, "nothing stays on the device"


def test_close_frees_everything_caches_included(bed: Bed) -> None:
    runner = bed.runner()
    first = runner.forward(np.zeros((1, 4), np.int64))
    second = runner.forward(np.zeros((2, 1), np.int64))
    assert bed.driver.live > 0
    runner.close()
    runner.close()
    assert bed.driver.live == 0
    with pytest.raises(SessionError, match="closed"):
        runner.forward(np.zeros((1, 4), np.int64), None, first.cache, 1)
    del first, second
    assert bed.driver.live == 0


def test_a_runner_that_is_dropped_frees_everything(bed: Bed) -> None:
    runner = bed.runner()
    step = runner.forward(np.zeros((1, 4), np.int64))
    del runner, step
    gc.collect()
    assert bed.driver.live == 0


def test_idle_slots_make_room_before_memory_is_said_to_be_full(bed: Bed) -> None:
    ids = np.random.default_rng(7).integers(0, VOCAB, (3, 9))
    with bed.runner() as runner:
        # A cache that nobody has any more, and then one that only fits without it.
        runner.forward(ids[:2, :2])
        idle = bed.driver.used
        bed.driver.total = idle + 100
        step = runner.forward(ids[:1, :3], keep=0)
        assert bed.driver.used < idle
        np.testing.assert_allclose(step.logits[0], text_logits(ids[0, :3], "fp32"), atol=2e-4)
        with pytest.raises(OutOfMemoryError, match="cuMemAlloc"):
            runner.forward(ids)
        # What did fit goes on.
        step = runner.forward(ids[:1, 3:], None, step.cache, 0)
        np.testing.assert_allclose(step.logits[0], text_logits(ids[0], "fp32")[3:], atol=2e-4)


def test_few_slots_wait(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "MAX_IDLE", 1)
    with bed.runner() as runner:
        runner.forward(np.zeros((1, 2), np.int64))
        used = bed.driver.used
        runner.forward(np.zeros((2, 2), np.int64))
        runner.forward(np.zeros((1, 2), np.int64))
        assert bed.driver.used == used


def test_too_little_memory_is_told_before_weights_are_copied(tmp_path: Path) -> None:
    bed = Bed(tmp_path, total=60_000)
    with pytest.raises(OutOfMemoryError, match="Paper GPU has") as caught:
        bed.runner()
    assert "--max-context" in caught.value.next_step


def test_an_engine_that_does_not_load_is_one_line_with_the_reason(bed: Bed) -> None:
    (bed.folder / "engine.plan").write_bytes(b"?ngine")
    with pytest.raises(EngineMismatchError) as caught:
        bed.runner()
    assert caught.value.what == (
        "TensorRT 1.7.1.116 does not load the engine (unsupported cc): Serialization assertion failed in parsePlan"
    )
    assert "gptoss-export --target trt-fp32 --trt-flavor rtx " in caught.value.next_step


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"attention_mask": ("INT64", (-1, -1))}, "attention_mask"),
        ({"scales": ("INT8", (VOCAB + 1,))}, "scales"),
        ({"scales": ("UINT8", (VOCAB,))}, "scales"),
        ({"write_index": ("INT32", (-1,))}, "write_index"),
        ({"past_key_values.1.key": ("HALF", (-1, HEADS, 384, DIM))}, "past_key_values.1.key"),
        ({"present.0.value": ("FLOAT", (-1, HEADS, 384, DIM + 1))}, "present.0.value"),
        ({"present.2.key": ("FLOAT", (-1, HEADS, 384, DIM))}, "present.2.key"),
        ({"past_key_values.0.value": ("FLOAT", (-1, HEADS, 128, DIM))}, "past_key_values.0.value"),
        ({"logits": ("HALF", (-1, VOCAB))}, "logits"),
    ],
)
def test_an_engine_of_another_interface_is_refused(bed: Bed, tensors: dict, named: str) -> None:
    bed.trt.tensors = tensors
    with pytest.raises(EngineMismatchError, match=named):
        bed.runner()


def test_an_engine_without_its_profiles_is_refused(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "num_optimization_profiles", 1)
    with pytest.raises(EngineMismatchError, match="1 profiles"):
        bed.runner()


def test_what_tensorrt_refuses_is_one_line(bed: Bed) -> None:
    with bed.runner() as runner:
        bed.engine.refuses.add("key_positions")
        with pytest.raises(SessionError, match=r"refuses key_positions of shape \[1, 128\]: no key_positions here"):
            runner.forward(np.zeros((1, 2), np.int64))


def test_what_a_plugin_failed_with_comes_first(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = []

    def check() -> None:
        if failed:
            raise failed[0]

    kernels = SimpleNamespace(require_no_failures=check)
    monkeypatch.setattr("gptoss_export.engines.tensorrt.plugin.register", lambda trt, bundle, logger: kernels)
    bed.metadata = replace(bed.metadata, plugin=True)
    with bed.runner() as runner:
        runner.forward(np.zeros((1, 2), np.int64))
        failed.append(EngineMismatchError("kernels for 8.0, and this is 9.0", "build it again"))
        with pytest.raises(EngineMismatchError, match=r"this is 9\.0"):
            runner.forward(np.zeros((1, 2), np.int64))
    with pytest.raises(EngineMismatchError, match=r"this is 9\.0"):
        bed.runner()


def test_rows_of_logits_do_not_change_under_a_graph(tmp_path: Path) -> None:
    bed = Bed(tmp_path, max_prompt=1)
    ids = np.random.default_rng(9).integers(0, VOCAB, (2, 5))
    with bed.runner() as runner:
        step = runner.forward(ids, keep=1)
    assert bed.driver.counts["launches"] > 0
    for row in (0, 1):
        np.testing.assert_allclose(step.logits[row, 0], text_logits(ids[row], "fp32")[-1], atol=2e-4)


def test_a_failure_on_the_device_has_the_driver_s_name(bed: Bed) -> None:
    with bed.runner() as runner:
        bed.driver.sticky = Result.CUDA_ERROR_ILLEGAL_ADDRESS
        with pytest.raises(SessionError, match="cuStreamSynchronize failed with CUDA_ERROR_ILLEGAL_ADDRESS"):
            runner.forward(np.zeros((1, 2), np.int64))
        bed.driver.sticky = None


def test_the_device_and_its_errors(bed: Bed) -> None:
    device = Device(bed.driver)
    assert (device.info.name, device.info.compute_capability) == ("Paper GPU", (8, 9))
    memory = device.allocate(100)
    assert device.free_bytes() == bed.driver.total - 100
    with pytest.raises(OutOfMemoryError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        device.allocate(bed.driver.total)
    stream, staging = device.stream(), device.pin(16)
    with pytest.raises(SessionError, match="cuMemcpyHtoDAsync failed with CUDA_ERROR_INVALID_VALUE"):
        stream.upload(0, staging, 4)
    staging.array[:] = np.arange(16)
    stream.upload(memory.pointer, staging, 16)
    graph = stream.capture(lambda: stream.fill(memory.pointer, 9, 2))
    stream.synchronize()
    assert bed.driver.read(memory.pointer, 3).tolist() == [0, 1, 2], "captured, not done"
    stream.launch(graph)
    stream.download(staging, memory.pointer, 16)
    stream.synchronize()
    assert staging.array[:4].tolist() == [9, 9, 2, 3]
    with pytest.raises(ZeroDivisionError):
        stream.capture(lambda: 1 // 0)
    stream.synchronize()
    for thing in (graph, staging, memory, stream, device):
        thing.close()
        thing.close()
    assert bed.driver.live == 0


def test_without_a_device_a_runner_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss_export.engines.tensorrt.cuda.device_missing", lambda: "no NVIDIA driver")
    with pytest.raises(TargetUnavailableError, match="cannot execute an engine: no NVIDIA driver"):
        Device()


def test_fp16_and_fp32_caches_differ_in_size(tmp_path: Path) -> None:
    used = {}
    for dtype in ("fp16", "fp32"):
        folder = tmp_path / dtype
        folder.mkdir()
        bed = Bed(folder, dtype=dtype, max_context=4096)
        with bed.runner() as runner:
            before = bed.driver.used
            runner.forward(np.zeros((1, 2), np.int64))
            used[dtype] = bed.driver.used - before
    elements = len(WINDOWS) * 2 * HEADS * slots_for(4096) * DIM
    assert used == {"fp16": 2 * elements, "fp32": 4 * elements}


def test_limits_come_from_the_metadata(bed: Bed) -> None:
    bed.metadata = replace(bed.metadata, max_context=310)
    with bed.runner() as runner, pytest.raises(PromptError, match="at most 310"):
        runner.forward(np.zeros((1, 311), np.int64))
