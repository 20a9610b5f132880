"""`engines.inspector` for graphs that ONNX Runtime runs: of its own targets, and those that stand in for an engine.

A text is one row without padding and its positions run in order, so what comes out of the calls of a runner, however
it cuts the text, is put together in that order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gptoss_export.engines.external_data import read_model
from gptoss_export.engines.inspector import EndsChunk, LayerOutputs, RoutedChunk
from gptoss_export.engines.ort import anatomy, taps
from gptoss_export.engines.ort.run import runner_on
from gptoss_export.engines.ort.session import MODEL_FILE, describe, start
from gptoss_export.engines.ort.tapped import TappedSession
from gptoss_export.engines.runner import KVCache, Logits, Runner, Tokens
from gptoss_export.exporter.errors import PromptError, SessionError

if TYPE_CHECKING:
    import onnx_ir as ir

ANY_INDEX = 1 << 62
"""The size of the vocabulary for a runner whose ids are indexes into tables."""


class Backend(Protocol):
    """How changed graphs of one artifact are run. token_rows: see `taps.tap_model`."""

    @property
    def description(self) -> str: ...

    @property
    def token_rows(self) -> bool: ...

    def session(self, model: ir.Model) -> Any:
        """An InferenceSession; the model may be changed. Raises SessionError."""
        ...

    def runner(self, session: TappedSession) -> Runner: ...


@dataclass(frozen=True)
class OrtBackend:
    """Of an artifact of ONNX Runtime. kernels: as in `session.open_session`."""

    folder: Path
    provider: str
    threads: int | None
    kernels: bool
    token_rows: bool = False

    @property
    def description(self) -> str:
        return runtime_name(self.provider)

    def session(self, model: ir.Model) -> Any:
        import onnx_ir as ir

        proto = ir.to_proto(model).SerializeToString()
        return start(self.folder, self.provider, self.threads, kernels=self.kernels, model=proto)

    def runner(self, session: TappedSession) -> Runner:
        return runner_on(replace(describe(session), vocab_size=ANY_INDEX))


def runtime_name(provider: str) -> str:
    import onnxruntime as ort

    return f"onnxruntime {ort.__version__}, {provider}"


def open_ort_inspector(folder: Path, provider: str, threads: int | None, *, kernels: bool) -> GraphInspector:
    """The inspector of the artifact in `folder`. Raises SessionError, GraphError."""
    return GraphInspector(load_graph(folder), OrtBackend(folder, provider, threads, kernels))


def load_graph(folder: Path) -> ir.Model:
    """`folder`/model.onnx without its weights. Raises what `read_model` raises, SessionError for what is no graph."""
    import onnx
    import onnx_ir as ir

    data = read_model(folder)
    try:
        model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(data))
        ir.external_data.set_base_dir(model.graph, folder)
        return model
    except Exception as error:  # types of onnx_ir, and those of Python that it lets through
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SessionError(f"{folder / MODEL_FILE} cannot be read as ONNX: {reason}", "Export again.") from error


@dataclass(frozen=True)
class _Whole:
    """A session on the whole model. replay: whether the experts are given."""

    replay: bool
    session: TappedSession
    runner: Runner
    taps: tuple[Mapping[str, str], ...]


class GraphInspector:
    """See `engines.inspector.Inspector`. model: without weights; it is not changed. For one thread at a time."""

    def __init__(self, model: ir.Model, backend: Backend) -> None:
        self._model, self._backend = model, backend
        self._whole: _Whole | None = None
        self._layers, self._experts = anatomy.count_layers(model), anatomy.num_experts(model)
        self._vocab_size = anatomy.vocab_size(model)

    @property
    def num_layers(self) -> int:
        return self._layers

    @property
    def description(self) -> str:
        return self._backend.description

    def route(self, ids: Tokens, *, experts: NDArray[np.int64] | None = None, rows: int) -> Iterator[RoutedChunk]:
        """See `engines.inspector.Inspector`. The session is kept for the next text, until a layer is asked for."""
        _check_ids(ids, self._vocab_size)
        tables: dict[str, NDArray[Any]] = {taps.TOKENS: ids.astype(np.int64)}
        if experts is not None:
            if experts.ndim != 3 or experts.shape[:2] != (len(ids), self._layers):
                raise ValueError(f"experts {experts.shape} of {len(ids)} positions in {self._layers} layers")
            if experts.min() < 0 or experts.max() >= self._experts:
                raise ValueError(f"experts {experts.min()} to {experts.max()}, and a layer has {self._experts}")
            tables[taps.REPLAY] = experts.astype(np.int64)
        return self._route(tables, len(ids), rows)

    def layer(self, index: int) -> OneLayer:
        """See `engines.inspector.Inspector`. Raises ValueError where there is no such layer, SessionError."""
        if not 0 <= index < self._layers:
            raise ValueError(f"layer {index} of {self._layers}")
        self._whole = None
        tapped = taps.cut_layer(self._model.clone(), index, token_rows=self._backend.token_rows)
        return OneLayer(tapped, *_open(tapped, self._backend))

    def ends(self) -> OpenEnds:
        """See `engines.inspector.Inspector`. Raises SessionError, GraphError."""
        self._whole = None
        tapped = taps.cut_ends(self._model.clone(), token_rows=self._backend.token_rows)
        return OpenEnds(tapped, *_open(tapped, self._backend), self._vocab_size)

    def _route(self, tables: Mapping[str, NDArray[Any]], count: int, rows: int) -> Iterator[RoutedChunk]:
        whole = self._open_whole(taps.REPLAY in tables)
        wanted = [name for layer in whole.taps for name in layer.values()]
        for start_at, logits, taken in _in_chunks(whole.session, whole.runner, tables, wanted, count, rows):
            weights, experts = (
                np.stack([taken[layer[name]] for layer in whole.taps], axis=1) for name in (taps.WEIGHTS, taps.EXPERTS)
            )
            yield RoutedChunk(start_at, logits, weights, experts.astype(np.int64))

    def _open_whole(self, replay: bool) -> _Whole:
        whole = self._whole
        if whole is None or whole.replay is not replay:
            self._whole = None  # before the next: two sessions would hold what they packed of the weights twice
            tapped = taps.tap_model(self._model.clone(), replay=replay, token_rows=self._backend.token_rows)
            whole = self._whole = _Whole(replay, *_open(tapped, self._backend), tapped.taps)
        return whole


class OneLayer:
    """See `engines.inspector.LayerInspector`."""

    def __init__(self, tapped: taps.Tapped, session: TappedSession, runner: Runner) -> None:
        (self._taps,), self._types = tapped.taps, tapped.types
        self._session, self._runner = session, runner

    def run(
        self,
        hidden: NDArray[np.float32],
        residual: NDArray[np.float32],
        calls: Sequence[int] | None = None,
        *,
        ops: bool = False,
    ) -> LayerOutputs:
        """See `engines.inspector.LayerInspector`."""
        lengths = [len(hidden)] if calls is None else list(calls)
        if hidden.ndim != 2 or hidden.shape != residual.shape:
            raise ValueError(f"hidden {hidden.shape} and residual {residual.shape}")
        if not lengths or min(lengths) < 1 or sum(lengths) != len(hidden):
            raise ValueError(f"calls of {lengths} positions, and there are {len(hidden)}")
        shown = [taps.ATTENTION, taps.OUTPUT, taps.WEIGHTS, taps.EXPERTS, *(self._types if ops else ())]
        tables = {taps.HIDDEN: hidden.astype(np.float32), taps.RESIDUAL: residual.astype(np.float32)}
        # Two operations may be one value, which is fetched once.
        self._session.feed(tables, list(dict.fromkeys(self._taps[name] for name in shown)))
        cache: KVCache | None = None
        begin = 0
        for length in lengths:
            cache = self._runner.forward(np.arange(begin, begin + length)[None], cache=cache, keep=1).cache
            begin += length
        taken = self._session.take()
        return LayerOutputs(
            attention=taken[self._taps[taps.ATTENTION]],
            output=taken[self._taps[taps.OUTPUT]],
            weights=taken[self._taps[taps.WEIGHTS]],
            experts=taken[self._taps[taps.EXPERTS]].astype(np.int64),
            ops={name: taken[self._taps[name]] for name in self._types} if ops else {},
            types=self._types,
        )


class OpenEnds:
    """See `engines.inspector.EndsInspector`."""

    def __init__(self, tapped: taps.Tapped, session: TappedSession, runner: Runner, vocab_size: int) -> None:
        (self._taps,), self._vocab_size = tapped.taps, vocab_size
        self._session, self._runner = session, runner

    def run(self, ids: Tokens, last: NDArray[np.float32], *, rows: int) -> Iterator[EndsChunk]:
        """See `engines.inspector.EndsInspector`."""
        _check_ids(ids, self._vocab_size)
        if last.ndim != 2 or len(last) != len(ids):
            raise ValueError(f"{len(ids)} ids and {last.shape} of the last layer")
        tables: dict[str, NDArray[Any]] = {taps.TOKENS: ids.astype(np.int64), taps.HIDDEN: last.astype(np.float32)}
        shown = [self._taps[name] for name in (taps.EMBEDDED, taps.NORMED)]
        for start_at, logits, taken in _in_chunks(self._session, self._runner, tables, shown, len(ids), rows):
            embedding, norm = (taken[name] for name in shown)
            yield EndsChunk(start_at, embedding, norm, logits)


def _in_chunks(
    session: TappedSession,
    runner: Runner,
    tables: Mapping[str, NDArray[Any]],
    wanted: Sequence[str],
    count: int,
    rows: int,
) -> Iterator[tuple[int, Logits, Mapping[str, NDArray[Any]]]]:
    """Runs `count` positions with one cache, at most `rows` a call: where each begins, its logits, and its taps."""
    cache: KVCache | None = None
    for start_at in range(0, count, rows):
        indexes = np.arange(start_at, min(start_at + rows, count))
        # Fed anew for each chunk: another text may have been run in between.
        session.feed(tables, wanted)
        step = runner.forward(indexes[None], cache=cache, keep=0)
        cache = step.cache
        yield start_at, step.logits[0], session.take()


def _check_ids(ids: Tokens, vocab_size: int) -> None:
    if ids.ndim != 1 or not ids.size or ids.min() < 0 or ids.max() >= vocab_size:
        raise PromptError(
            f"token ids of shape {ids.shape} that are none, or not all in the vocabulary",
            f"Give at least one, from 0 to {vocab_size - 1}.",
        )


def _open(tapped: taps.Tapped, backend: Backend) -> tuple[TappedSession, Runner]:
    names = [name for layer in tapped.taps for name in layer.values()]
    session = TappedSession(backend.session(tapped.model), tapped.tables, names)
    return session, backend.runner(session)
