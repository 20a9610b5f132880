"""Runs an artifact in ONNX Runtime.

The cache stays in ONNX Runtime's own values: what one call gives the next one takes, nothing is copied through numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_export.engines.ort.build import BATCHED_CHUNKS_KEY, MODEL_FILE
from gptoss_export.engines.runner import KVCache, Step, Tokens
from gptoss_export.exporter.errors import PromptError, SessionError, TargetUnavailableError


@dataclass(frozen=True)
class OrtCache:
    """values: key and value of each layer in turn, OrtValues [B, kv_heads, P, D]; mask: who is padding, [B, P]."""

    values: tuple[Any, ...]
    mask: Tokens

    @property
    def length(self) -> int:
        return int(self.mask.shape[1])


class OrtRunner:
    """A session on `folder`/model.onnx.

    Raises SessionError when ONNX Runtime refuses the model, TargetUnavailableError when it would run on another
    provider than the one asked for (it falls back silently).
    """

    def __init__(self, folder: Path, provider: str, threads: int | None = None) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        path = folder / MODEL_FILE
        try:
            # Folding would turn the stored bfloat16 into float32 and transposed copies of most of the model.
            session = ort.InferenceSession(path, options, providers=[provider], disabled_optimizers=["ConstantFolding"])
        except Exception as error:  # onnxruntime raises its own unexported types
            raise SessionError(
                f"onnxruntime {ort.__version__} refuses {path}: {str(error).splitlines()[0]}",
                "Export again with this version of onnxruntime, or install the one that the manifest names.",
            ) from error
        if provider not in session.get_providers():
            raise TargetUnavailableError(
                f"onnxruntime runs on {', '.join(session.get_providers())} instead of {provider}",
                f"Install the onnxruntime package that brings {provider}.",
            )
        self._session = session
        self._ort = ort
        inputs = {i.name: i for i in session.get_inputs()}
        self._cache_inputs = [name for name in inputs if name.startswith("past_key_values.")]
        self._outputs = [o.name for o in session.get_outputs()]
        shape = inputs[self._cache_inputs[0]].shape
        self._kv_heads, self._head_dim = int(shape[1]), int(shape[3])
        self._vocab_size = int(session.get_outputs()[0].shape[2])
        self._batched_chunks = session.get_modelmeta().custom_metadata_map.get(BATCHED_CHUNKS_KEY) != "false"

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
        """See `engines.runner.Runner`. Raises PromptError for ids, masks or caches that do not fit."""
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        self._check(input_ids, mask, keep)
        past = self._empty(len(input_ids)) if cache is None else cache
        if not isinstance(past, OrtCache) or len(past.mask) != len(input_ids):
            raise PromptError("the cache is not this runner's, or of another batch", "Begin with cache=None.")
        rows, new = input_ids.shape
        if rows > 1 and new > 1 and past.length and not self._batched_chunks:
            return self._row_by_row(input_ids, mask, past, keep)
        return self._run(input_ids, mask, past, keep)

    def _run(self, input_ids: Tokens, mask: Tokens, past: OrtCache, keep: int) -> Step:
        total = np.concatenate([past.mask, mask], axis=1)
        value = self._ort.OrtValue.ortvalue_from_numpy
        feeds = dict(zip(self._cache_inputs, past.values, strict=True))
        feeds["input_ids"] = value(np.ascontiguousarray(input_ids, np.int64))
        feeds["attention_mask"] = value(np.ascontiguousarray(total, np.int64))
        feeds["num_logits_to_keep"] = value(np.array(keep, np.int64))
        logits, *presents = self._session.run_with_ort_values(self._outputs, feeds)
        return Step(logits.numpy(), OrtCache(tuple(presents), total))

    def _row_by_row(self, input_ids: Tokens, mask: Tokens, past: OrtCache, keep: int) -> Step:
        """The same, for an attention operator that continues several rows by one position at a time only."""
        value = self._ort.OrtValue.ortvalue_from_numpy
        pasts = [v.numpy() for v in past.values]
        steps = [
            self._run(
                input_ids[b : b + 1],
                mask[b : b + 1],
                OrtCache(tuple(value(p[b : b + 1]) for p in pasts), past.mask[b : b + 1]),
                keep,
            )
            for b in range(len(input_ids))
        ]
        caches = [step.cache for step in steps]
        values = tuple(
            value(np.concatenate([cache.values[i].numpy() for cache in caches if isinstance(cache, OrtCache)]))
            for i in range(len(pasts))
        )
        total = np.concatenate([past.mask, mask], axis=1)
        return Step(np.concatenate([step.logits for step in steps]), OrtCache(values, total))

    def _empty(self, rows: int) -> OrtCache:
        nothing = np.zeros((rows, self._kv_heads, 0, self._head_dim), np.float32)
        value = self._ort.OrtValue.ortvalue_from_numpy(nothing)
        return OrtCache((value,) * len(self._cache_inputs), np.zeros((rows, 0), np.int64))

    def _check(self, input_ids: Tokens, mask: Tokens, keep: int) -> None:
        if input_ids.ndim != 2 or input_ids.size == 0 or mask.shape != input_ids.shape:
            raise PromptError(
                f"token ids of shape {input_ids.shape} with a mask of shape {mask.shape}",
                "Give both as [batch, sequence], with at least one position.",
            )
        if input_ids.min() < 0 or input_ids.max() >= self._vocab_size:
            first = input_ids[(input_ids < 0) | (input_ids >= self._vocab_size)][0]
            raise PromptError(f"token id {first} is not in the vocabulary", f"Ids are 0 to {self._vocab_size - 1}.")
        if not 0 <= keep <= input_ids.shape[1]:
            raise PromptError(
                f"logits of the last {keep} of {input_ids.shape[1]} positions", "keep is 0 (all) or fewer."
            )
