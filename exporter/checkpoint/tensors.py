"""Where each tensor of a checkpoint lies: names, types, shapes and byte ranges, never the bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from gptoss_export.exporter.checkpoint.config import ModelConfig
from gptoss_export.exporter.checkpoint.files import Stamp


class Layout(Enum):
    """The ways in which gpt-oss weights are published."""

    HF_MXFP4 = "huggingface-mxfp4"
    HF_BF16 = "huggingface-bf16"
    ORIGINAL = "openai-original"


@dataclass(frozen=True)
class TensorRef:
    """A tensor as a byte range of a safetensors file.

    name: canonical name, which is Hugging Face's (`model.layers.0.self_attn.q_proj.weight`), in any layout.
    stored_name: the name in the file's header; several tensors share one where the layout stacks them (qkv).
    file: the file as it is named in the checkpoint folder (may be a symlink).
    dtype: safetensors' name of the type: `BF16` or `U8`.
    offset, nbytes: absolute byte range in the file.
    stamp: of the file whose header was checked; None for a file that is still to be written.
    """

    name: str
    stored_name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    stamp: Stamp | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers agree with its config.

    root: the folder that holds config and weights. weight_files: every safetensors file that the tensors lie
    in, in the order of their names. side_files: tokenizer and generation files to ship along, as far as there
    are any. raw_config: config.json as parsed, for readers that want the original keys.
    """

    root: Path
    layout: Layout
    config: ModelConfig
    raw_config: Mapping[str, object]
    tensors: Mapping[str, TensorRef]
    weight_files: tuple[Path, ...]
    side_files: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(f.stat().st_size for f in self.weight_files)
