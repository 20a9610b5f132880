"""Opens a checkpoint folder: config, layout and every tensor's place, checked before any allocation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from gptoss_export.exporter.checkpoint.config import ModelConfig, parse_config
from gptoss_export.exporter.checkpoint.files import regular_size, shown
from gptoss_export.exporter.checkpoint.json_reader import read_json_object
from gptoss_export.exporter.checkpoint.layouts import ITEMSIZE, StoredTensor, detect_layout, stored_tensors
from gptoss_export.exporter.checkpoint.links import AllowedPlaces
from gptoss_export.exporter.checkpoint.read import check_scales, read_tensor
from gptoss_export.exporter.checkpoint.safetensors_header import HeaderEntry
from gptoss_export.exporter.checkpoint.shards import INDEX, SINGLE, find_shards
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, Layout, TensorRef
from gptoss_export.exporter.checkpoint.tokenizer import MAX_TOKENIZER_BYTES
from gptoss_export.exporter.errors import (
    AbsurdSizeError,
    CheckpointNotFoundError,
    ConfigError,
    MissingTensorError,
    ShardIndexError,
    SurplusTensorError,
    UnsafeFileError,
    WrongDtypeError,
    WrongShapeError,
)

__all__ = ["check_scales", "open_checkpoint", "read_tensor"]

MAX_CONFIG_BYTES = 4 << 20

# Files that are shipped along, and the most bytes that each can need (the released tokenizer.json has 27 MB).
SIDE_FILES = {
    "tokenizer.json": MAX_TOKENIZER_BYTES,
    "tokenizer_config.json": 16 << 20,
    "special_tokens_map.json": 16 << 20,
    "chat_template.jinja": 16 << 20,
    "generation_config.json": MAX_CONFIG_BYTES,
}

PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl"}


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads config and headers of a checkpoint in any layout; no tensor data.

    A folder without weights of its own that has an `original/` with some (as the releases do) means that one;
    the tokenizer is then still looked for in `folder`.

    Links may end in `folder` and, for a snapshot of the Hub cache, in its blobs. Raises the errors of
    `CheckpointError`, each naming what it found and what was expected.
    """
    root = _weights_root(folder)
    places = AllowedPlaces.of(folder)
    config_file = root / "config.json"
    places.check(config_file)
    try:
        raw = read_json_object(config_file, MAX_CONFIG_BYTES)
    except CheckpointNotFoundError as e:
        raise ConfigError(f"{config_file} is missing", "Take the one that came with the weights.") from e
    side_files = _side_files((root,) if root == folder else (root, folder), places)
    generation = next((f for f in side_files if f.name == "generation_config.json"), None)
    config = parse_config(raw, read_json_object(generation, MAX_CONFIG_BYTES) if generation else None)
    shards = find_shards(root, places)
    found = shards.tensors
    layout = detect_layout(found)
    if layout is None:
        raise CheckpointNotFoundError(
            f"{root}: these are not the tensors of a gpt-oss (the first is {shown(next(iter(found), None))})",
            "Give a checkpoint in the Hugging Face layout (MXFP4 or bf16) or OpenAI's original/ layout.",
        )
    tensors = _match(found, config, layout)
    if shards.phantoms:
        raise ShardIndexError(
            f"{INDEX} lists {shown(shards.phantoms[0])}, which is in no shard and no gpt-oss has",
            "Take index and shards of the same checkpoint.",
        )
    return Checkpoint(
        root=root,
        layout=layout,
        config=config,
        raw_config=raw,
        tensors=tensors,
        weight_files=tuple(sorted({file for file, _ in found.values()})),
        side_files=side_files,
    )


def _weights_root(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"{folder} is not a folder", "Give the folder of a checkpoint as --model.")
    for root in (folder, folder / "original"):
        if any((root / name).is_symlink() or (root / name).exists() for name in (INDEX, SINGLE)):
            return root
    names = sorted(p.name for p in folder.iterdir())
    if any(name.endswith(".safetensors") for name in names):
        raise CheckpointNotFoundError(
            f"{folder} has neither {INDEX} nor {SINGLE}, so its safetensors files cannot be told apart",
            f"Download {INDEX} too, which names the shards.",
        )
    pickles = [name for name in names if Path(name).suffix in PICKLE_SUFFIXES]
    if pickles:
        raise UnsafeFileError(
            f"{folder} holds weights only as pickle ({shown(pickles[0])}), which runs code when it is loaded",
            "Convert them to safetensors: transformers' save_pretrained does.",
        )
    raise CheckpointNotFoundError(f"{folder} holds no weights", f"It needs {SINGLE}, or shards and {INDEX}.")


def _side_files(folders: tuple[Path, ...], places: AllowedPlaces) -> tuple[Path, ...]:
    result = []
    for name, cap in SIDE_FILES.items():
        path = next((p for f in folders if (p := f / name).is_symlink() or p.exists()), None)
        if path is None:
            continue
        places.check(path)
        if (size := regular_size(path)) > cap:
            raise AbsurdSizeError(
                f"{path} has {size} bytes, more than the {cap} that it can need", "Download the file again."
            )
        result.append(path)
    return tuple(result)


def _match(found: Mapping[str, tuple[Path, HeaderEntry]], config: ModelConfig, layout: Layout) -> dict[str, TensorRef]:
    """Headers against the table: the canonical tensors, in the order of the network."""
    expected = {t.name: t for t in stored_tensors(config, layout)}
    if missing := [name for name in expected if name not in found]:
        raise MissingTensorError(
            f"tensor {missing[0]}{_more(missing)} is missing, which config.json implies "
            f"({config.num_layers} layers, layout {layout.value})",
            "Take config.json and weights of the same checkpoint, completely downloaded.",
        )
    if surplus := [name for name in found if name not in expected]:
        raise SurplusTensorError(
            f"tensor {shown(surplus[0])}{_more(surplus)} in {found[surplus[0]][0].name} is none of this "
            f"network's ({config.num_layers} layers, layout {layout.value})",
            "Take config.json and weights of the same checkpoint, or remove what does not belong to it.",
        )
    return {ref.name: ref for name, tensor in expected.items() for ref in _references(tensor, *found[name])}


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _references(tensor: StoredTensor, file: Path, entry: HeaderEntry) -> list[TensorRef]:
    same = "Take config.json and weights of the same checkpoint."
    if entry.dtype != tensor.dtype:
        raise WrongDtypeError(
            f"tensor {tensor.name} in {file.name} is {entry.dtype}, expected {tensor.dtype}",
            "Convert it to bfloat16." if tensor.dtype == "BF16" else same,
        )
    if entry.shape != tensor.shape:
        raise WrongShapeError(
            f"tensor {tensor.name} in {file.name} is {list(entry.shape)}, expected {list(tensor.shape)}", same
        )
    return [
        TensorRef(
            name=part.name,
            stored_name=tensor.name,
            file=file,
            dtype=tensor.dtype,
            shape=part.shape,
            offset=entry.offset + part.start,
            nbytes=math.prod(part.shape) * ITEMSIZE[tensor.dtype],
            stamp=entry.stamp,
        )
        for part in tensor.parts
    ]
