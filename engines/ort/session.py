"""A session on an artifact's model, and what can be read off it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_export.engines.external_data import read_model
from gptoss_export.engines.memory import out_of_memory, ran_out
from gptoss_export.engines.ort.library import kernel_library, kernels_work
from gptoss_export.engines.runner import Tokens
from gptoss_export.exporter.errors import PromptError, SessionError, TargetUnavailableError

MODEL_FILE = "model.onnx"

FOLDER_OPTION = "session.model_external_initializers_file_folder_path"
"""Where the weights of a model lie that comes from memory."""


@dataclass(frozen=True)
class Session:
    """An onnxruntime.InferenceSession and its interface.

    cache_inputs: past_key_values.N.key and .value of each layer in turn; the outputs after logits are in that order.
    metadata: the model's own.
    """

    session: Any
    cache_inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kv_heads: int
    head_dim: int
    vocab_size: int
    metadata: dict[str, str]


def open_session(folder: Path, provider: str, threads: int | None, *, kernels: bool) -> Session:
    """Opens `folder`/model.onnx, with the kernel library if `kernels` and there is one. Raises what `start` raises."""
    return describe(start(folder, provider, threads, kernels=kernels))


def start(folder: Path, provider: str, threads: int | None, *, kernels: bool, model: bytes | None = None) -> Any:
    """An InferenceSession of `folder`/model.onnx, or of a model that reads the same weights.

    Raises SessionError when ONNX Runtime refuses the model, OutOfMemoryError, TargetUnavailableError when it would run
    on another provider than the one asked for (it falls back silently).
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    if kernels and kernels_work() is None:
        options.register_custom_ops_library(str(kernel_library()))
    path = folder / MODEL_FILE
    checked = read_model(folder) if model is None else model
    options.add_session_config_entry(FOLDER_OPTION, str(folder))
    try:
        # Folding would turn the stored bfloat16 into float32 and transposed copies of most of the model.
        session = ort.InferenceSession(checked, options, providers=[provider], disabled_optimizers=["ConstantFolding"])
    except Exception as error:  # onnxruntime raises its own unexported types
        if ran_out(error):
            raise out_of_memory() from error
        raise SessionError(
            f"onnxruntime {ort.__version__} refuses {path}: {str(error).splitlines()[0]}",
            "Export again with this version of onnxruntime, or install the one that the manifest names.",
        ) from error
    if provider not in session.get_providers():
        raise TargetUnavailableError(
            f"onnxruntime runs on {', '.join(session.get_providers())} instead of {provider}",
            f"Install the onnxruntime package that brings {provider}.",
        )
    return session


def describe(session: Any) -> Session:
    """What can be read off an InferenceSession. Raises SessionError for a model that no target of ours has made."""
    inputs = {i.name: i for i in session.get_inputs()}
    cache_inputs = tuple(name for name in inputs if name.startswith("past_key_values."))
    outputs = session.get_outputs()
    try:
        shape = inputs[cache_inputs[0]].shape
        return Session(
            session=session,
            cache_inputs=cache_inputs,
            outputs=tuple(o.name for o in outputs),
            kv_heads=int(shape[1]),
            head_dim=int(shape[3]),
            vocab_size=int(outputs[0].shape[2]),
            metadata=dict(session.get_modelmeta().custom_metadata_map),
        )
    except (IndexError, TypeError, ValueError) as error:
        raise SessionError(
            f"{MODEL_FILE} has not the inputs and outputs of a gpt-oss that gptoss-export wrote", "Export again."
        ) from error


def check_call(input_ids: Tokens, mask: Tokens, keep: int, vocab_size: int) -> None:
    """Raises PromptError for ids, a mask or a `keep` that no model could run."""
    if input_ids.ndim != 2 or input_ids.size == 0 or mask.shape != input_ids.shape:
        raise PromptError(
            f"token ids of shape {input_ids.shape} with a mask of shape {mask.shape}",
            "Give both as [batch, sequence], with at least one position.",
        )
    if input_ids.min() < 0 or input_ids.max() >= vocab_size:
        first = input_ids[(input_ids < 0) | (input_ids >= vocab_size)][0]
        raise PromptError(f"token id {first} is not in the vocabulary", f"Ids are 0 to {vocab_size - 1}.")
    if not 0 <= keep <= input_ids.shape[1]:
        raise PromptError(f"logits of the last {keep} of {input_ids.shape[1]} positions", "keep is 0 (all) or fewer.")


def foreign_cache() -> PromptError:
    """The error for a cache that cannot be continued."""
    return PromptError(
        "the cache is of another runner or batch, or was continued already", "Begin again with cache=None."
    )


def as_int64(tokens: Tokens) -> Tokens:
    """Contiguous int64, which is what ONNX Runtime reads."""
    return np.ascontiguousarray(tokens, np.int64)
