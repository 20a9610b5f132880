"""A session on a changed graph that looks to a runner like one on the unchanged graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class TappedSession:
    """The part of onnxruntime.InferenceSession that runners use. Tables are fed and taps collected at every run.

    session: of the changed graph. tables, taps: names of inputs and outputs that runners do not see.
    """

    def __init__(self, session: Any, tables: Sequence[str], taps: Sequence[str]) -> None:
        self._session = session
        self._hidden = {*tables, *taps}
        self._tables: dict[str, Any] = {}
        self._wanted: list[str] = []
        self._taken: list[list[NDArray[Any]]] = []

    def feed(self, tables: Mapping[str, NDArray[Any]], wanted: Sequence[str]) -> None:
        """From now on these tables go in, and what comes out under the names in `wanted` is kept until `take`."""
        import onnxruntime as ort

        arrays = {name: np.ascontiguousarray(array) for name, array in tables.items()}
        self._tables = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        self._wanted, self._taken = list(wanted), []

    def take(self) -> dict[str, NDArray[Any]]:
        """What came out since the last time, [positions, width] by name: positions in the order of the runs."""
        taken, self._taken = self._taken, []
        return {
            name: np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])
            for name, parts in zip(self._wanted, zip(*taken, strict=True), strict=True)
        }

    def get_inputs(self) -> list[Any]:
        return [value for value in self._session.get_inputs() if value.name not in self._hidden]

    def get_outputs(self) -> list[Any]:
        return [value for value in self._session.get_outputs() if value.name not in self._hidden]

    def get_modelmeta(self) -> Any:
        return self._session.get_modelmeta()

    def io_binding(self) -> Any:
        binding = self._session.io_binding()
        for name, value in self._tables.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def run_with_iobinding(self, binding: Any) -> None:
        for name in self._wanted:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        self._taken.append([value.numpy() for value in outputs[len(outputs) - len(self._wanted) :]])

    def run_with_ort_values(self, outputs: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
        values = self._session.run_with_ort_values([*outputs, *self._wanted], {**feeds, **self._tables})
        self._taken.append([value.numpy() for value in values[len(outputs) :]])
        return list(values[: len(outputs)])
