"""Which safetensors files make up a checkpoint, and which tensor lies in which of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gptoss_export.exporter.checkpoint.files import shown
from gptoss_export.exporter.checkpoint.json_reader import read_json_object
from gptoss_export.exporter.checkpoint.links import AllowedPlaces
from gptoss_export.exporter.checkpoint.safetensors_header import HeaderEntry, read_header
from gptoss_export.exporter.errors import CheckpointNotFoundError, DuplicateTensorError, ShardIndexError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_INDEX_BYTES = 64 << 20

_AGAIN = "Download the checkpoint again; index and shards have to be of the same revision."


@dataclass(frozen=True)
class Shards:
    """Every stored tensor of a checkpoint: its file and its header entry. phantoms: names only the index has."""

    tensors: Mapping[str, tuple[Path, HeaderEntry]]
    phantoms: tuple[str, ...] = ()


def find_shards(root: Path, places: AllowedPlaces) -> Shards:
    """Reads the headers of the checkpoint in `root`.

    Shards are those that the index names, never those that a pattern finds; without an index there is one file.
    Raises ShardIndexError where index and headers disagree, DuplicateTensorError for a tensor in two shards,
    UnsafeFileError for a link out of `places`, and the errors of `read_header`.
    """
    index_file = root / INDEX
    if not index_file.is_symlink() and not index_file.exists():
        single = root / SINGLE
        places.check(single)
        return Shards({name: (single, entry) for name, entry in read_header(single).items()})
    places.check(index_file)
    weight_map = _weight_map(index_file)
    found: dict[str, tuple[Path, HeaderEntry]] = {}
    for shard in sorted(set(weight_map.values())):
        places.check(root / shard)
        for name, entry in _shard_header(root / shard).items():
            if name in found:
                raise DuplicateTensorError(f"tensor {shown(name)} is in {found[name][0].name} and in {shard}", _AGAIN)
            found[name] = (root / shard, entry)
    for name, (file, _) in found.items():
        if weight_map.get(name, file.name) != file.name:
            raise ShardIndexError(
                f"{INDEX} says that {shown(name)} is in {weight_map[name]}, but {file.name} has it", _AGAIN
            )
    return Shards(found, tuple(name for name in weight_map if name not in found))


def _weight_map(index_file: Path) -> dict[str, str]:
    raw = read_json_object(index_file, MAX_INDEX_BYTES, ShardIndexError)
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ShardIndexError(f"{index_file}: weight_map is missing, empty or no object", _AGAIN)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _plain(shard):
            raise ShardIndexError(
                f"{index_file}: {shown(name)} is in {shown(shard)}, which is no plain *.safetensors name",
                "Find out who wrote this checkpoint: an index must not lead out of its folder.",
            )
    return weight_map


def _plain(name: str) -> bool:
    return name.endswith(".safetensors") and name.isprintable() and not set(name) & set("/\\:") and len(name) < 256


def _shard_header(path: Path) -> dict[str, HeaderEntry]:
    try:
        return read_header(path)
    except CheckpointNotFoundError as e:
        raise ShardIndexError(f"{path.name}, which {INDEX} names, is not there", _AGAIN) from e
