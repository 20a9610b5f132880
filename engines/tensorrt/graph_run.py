"""Runs the lowered graph in ONNX Runtime on CPU, where no GPU runs the engine: what "graph parity" measures.

The same file that TensorRT built the engine from, the same weights, the same plan of slots; operators of 16 bits are
emulated (`engines.tensorrt.emulate`), the experts run by their function body.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptoss_export.engines.external_data import check_weight_file
from gptoss_export.engines.ort.inspect import load_graph
from gptoss_export.engines.ort.session import FOLDER_OPTION, check_call, foreign_cache
from gptoss_export.engines.runner import KVCache, Logits, Step, Tokens
from gptoss_export.engines.tensorrt.cache import EngineCall, Limits, SlotState, plan_call, run_calls
from gptoss_export.engines.tensorrt.emulate import emulate
from gptoss_export.engines.tensorrt.metadata import EngineInput, EngineMetadata, read_metadata
from gptoss_export.exporter.errors import ManifestError, SessionError
from gptoss_export.exporter.inside import open_inside

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class GraphCache:
    """values: key and value of each layer in turn, OrtValues [B, kv_heads, C, D]; state: what lies in the slots."""

    values: tuple[Any, ...]
    state: SlotState

    @property
    def length(self) -> int:
        return self.state.length


class GraphRunner:
    """See `engines.runner.Runner`."""

    def __init__(self, session: Any, weights: dict[str, Any], limits: Limits, vocab_size: int | None = None) -> None:
        """vocab_size: None: what the logits have."""
        self._session, self._weights = session, weights
        self.limits = limits
        inputs = {i.name: i for i in session.get_inputs()}
        self._caches = [i for name, i in inputs.items() if name.startswith("past_key_values.")]
        self._outputs = [o.name for o in session.get_outputs()]
        self._vocab_size = vocab_size or int(session.get_outputs()[0].shape[1])

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def forward(
        self,
        input_ids: Tokens,
        attention_mask: Tokens | None = None,
        cache: KVCache | None = None,
        keep: int = 1,
    ) -> Step:
        """See `engines.runner.Runner`. Raises PromptError for what the engine's limits do not allow."""
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        check_call(input_ids, mask, keep, self.vocab_size)
        past = GraphCache((), SlotState.empty(len(input_ids))) if cache is None else cache
        if not isinstance(past, GraphCache) or past.state.rows != len(input_ids):
            raise foreign_cache()
        calls = plan_call(past.state, input_ids, mask, keep, self.limits)
        values = past.values or self._empty(len(input_ids))

        def execute(call: EngineCall) -> Logits:
            nonlocal values
            logits, values = self._run(call, values)
            return logits

        logits = run_calls(calls, execute)
        return Step(logits, GraphCache(values, calls[-1].state))

    def _run(self, call: EngineCall, values: tuple[Any, ...]) -> tuple[Logits, tuple[Any, ...]]:
        import onnxruntime as ort

        feeds = dict(zip((cache.name for cache in self._caches), values, strict=True))
        for name in ("input_ids", "query_positions", "key_positions", "write_index", "logit_rows"):
            feeds[name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(getattr(call, name)))
        logits, *presents = self._session.run_with_ort_values(self._outputs, feeds | self._weights)
        return logits.numpy(), tuple(presents)

    def _empty(self, rows: int) -> tuple[Any, ...]:
        import onnxruntime as ort

        values = []
        for cache in self._caches:
            zeros = np.zeros((rows, *cache.shape[1:]), _NUMPY[cache.type])
            values.append(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(zeros, _ONNX[cache.type]))
        return tuple(values)


_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bfloat16)": np.uint16}
_ONNX = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}
_STORED = {"BF16": (np.uint16, 16), "U8": (np.int8, 3)}
"""How an external weight is fed: numpy's type of its bytes, ONNX's number of its type."""


def open_graph_runner(folder: Path, threads: int | None = None) -> GraphRunner:
    """A runner of `folder`/model.onnx. Raises SessionError, and what reading model.onnx and engine.json raises."""
    metadata = read_metadata(folder)
    session = start(load_graph(folder), folder, threads)
    return GraphRunner(session, external_weights(session, folder, metadata), metadata.limits)


def start(model: ir.Model, folder: Path, threads: int | None) -> Any:
    """An InferenceSession of a lowered graph whose weights lie in `folder`; it is changed. Raises SessionError."""
    import onnx_ir as ir
    import onnxruntime as ort

    emulate(model)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry(FOLDER_OPTION, str(folder))
    try:
        proto = ir.to_proto(model).SerializeToString()
        return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own unexported types
        raise SessionError(
            f"onnxruntime {ort.__version__} refuses the graph of {folder}: {str(error).splitlines()[0]}",
            "Export again; report this if it stays so.",
        ) from error


def external_weights(session: Any, folder: Path, metadata: EngineMetadata) -> dict[str, Any]:
    """Those of the engine's weight inputs that the session has, mapped."""
    wanted = {value.name for value in session.get_inputs()}
    return {name: _weight(folder, entry) for name, entry in metadata.inputs.items() if name in wanted}


def _weight(folder: Path, entry: EngineInput) -> Any:
    """An external weight as the bytes of its file, mapped."""
    import onnxruntime as ort

    if entry.dtype not in _STORED:
        raise ManifestError(f"engine.json: an engine input of the type {entry.dtype}, which none has", "export again")
    dtype, onnx_type = _STORED[entry.dtype]
    check_weight_file(folder, entry.file, entry.offset + entry.nbytes)
    with open_inside(folder, entry.file) as f:
        mapped = np.memmap(f, dtype=dtype, mode="c", offset=entry.offset, shape=entry.shape)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(mapped, onnx_type)
