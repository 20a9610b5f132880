"""Writes random checkpoints of any shape, in any layout, as large as a released one.

synthesize(Path("random-20b"), PRESETS["20b"])
synthesize(Path("two-layers"), replace(PRESETS["20b"], num_layers=2), layout=Layout.ORIGINAL)
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from gptoss_export.exporter.checkpoint.config import alternating, parse_config
from gptoss_export.exporter.checkpoint.layouts import StoredTensor, stored_tensors
from gptoss_export.exporter.checkpoint.shards import INDEX, SINGLE
from gptoss_export.exporter.checkpoint.synth_values import Bytes, RandomWeights
from gptoss_export.exporter.checkpoint.tensors import Layout
from gptoss_export.exporter.errors import ConfigError, DiskSpaceError, OutputExistsError

SHARD_BYTES = 5_000_000_000

# <|return|> and <|endoftext|> of o200k_harmony, as far as the vocabulary has them.
EOS_TOKEN, PAD_TOKEN = 200002, 199999


@dataclass(frozen=True)
class SynthShape:
    """The sizes of a network to make up, by default gpt-oss-20b's. Layers slide alternately, as released."""

    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_layers: int = 24
    num_experts: int = 32
    top_k: int = 4
    num_heads: int = 64
    num_kv_heads: int = 8
    head_dim: int = 64
    sliding_window: int = 128
    initial_context: int = 4096
    rope_factor: float = 32.0
    rope_theta: float = 150000.0


PRESETS = {"20b": SynthShape(), "120b": SynthShape(num_layers=36, num_experts=128)}


def synthesize(
    out: Path,
    shape: SynthShape,
    *,
    layout: Layout = Layout.HF_MXFP4,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes config.json and weights to the folder `out`, which appears only when they are complete.

    The same shape and seed give the same network in every layout and every sharding. shard_bytes: the most
    bytes of tensors in a file, unless one tensor alone has more. progress: called with bytes written and in
    all. Memory stays below 400 MB for experts of the released size, however many.

    Raises OutputExistsError, DiskSpaceError, and ConfigError or AbsurdSizeError for shapes no gpt-oss has.
    """
    if seed < 0:
        raise ConfigError(f"seed {seed} is negative", "Give a seed from 0 on.")
    raw = raw_config(shape, layout)
    config = parse_config(raw)
    tensors = list(stored_tensors(config, layout))
    total = sum(t.nbytes for t in tensors)
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise OutputExistsError(f"{out} exists already", "Give a folder that does not exist yet, or remove this one.")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if total > free:
        raise _no_space(out, total, free)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        _write_shards(partial, _shards(tensors, shard_bytes), RandomWeights(config, seed), total, progress)
        (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        partial.rename(out)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(out, total, free) from e
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def raw_config(shape: SynthShape, layout: Layout) -> dict[str, object]:
    """The config.json of a shape, in the style that goes with the layout."""
    common: dict[str, object] = {
        "num_hidden_layers": shape.num_layers,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "swiglu_limit": 7.0,
        "head_dim": shape.head_dim,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "sliding_window": shape.sliding_window,
        "initial_context_length": shape.initial_context,
        "rope_theta": shape.rope_theta,
    }
    if layout is Layout.ORIGINAL:
        return common | {
            "num_experts": shape.num_experts,
            "experts_per_token": shape.top_k,
            "rope_scaling_factor": shape.rope_factor,
            "rope_ntk_alpha": 1.0,
            "rope_ntk_beta": 32.0,
        }
    special = {"eos_token_id": EOS_TOKEN, "pad_token_id": PAD_TOKEN}
    huggingface = common | {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "experts_per_token": shape.top_k,
        "layer_types": list(alternating(shape.num_layers)),
        "max_position_embeddings": int(shape.initial_context * shape.rope_factor),
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": shape.rope_factor,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": shape.initial_context,
            "truncate": False,
        },
        **{key: min(token, shape.vocab_size - 1) for key, token in special.items()},
    }
    if layout is Layout.HF_MXFP4:
        dense = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        huggingface["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": dense}
    return huggingface


def _shards(tensors: list[StoredTensor], shard_bytes: int) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_shards(
    folder: Path,
    shards: list[list[StoredTensor]],
    weights: RandomWeights,
    total: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    weight_map: dict[str, str] = {}
    written = 0
    threads = min(4, os.cpu_count() or 1)
    for n, tensors in enumerate(shards):
        name = SINGLE if len(shards) == 1 else f"model-{n:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor.name: name for tensor in tensors}
        pieces = chain.from_iterable(weights.pieces(tensor) for tensor in tensors)
        with (folder / name).open("wb") as f, ThreadPoolExecutor(threads) as pool:
            f.write(_header(tensors))
            for piece in _in_order(pool, pieces, threads + 1):
                f.write(piece.data)
                written += len(piece)
                if progress:
                    progress(written, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _in_order(pool: ThreadPoolExecutor, pieces: Iterable[Callable[[], Bytes]], ahead: int) -> Iterator[Bytes]:
    """Results in the order of the calls, at most `ahead` of them made before they are asked for."""
    pending: deque[Future[Bytes]] = deque()
    for piece in pieces:
        pending.append(pool.submit(piece))
        if len(pending) == ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _header(tensors: list[StoredTensor]) -> bytes:
    """A safetensors header, padded so that the tensors start at a multiple of eight."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _no_space(out: Path, needed: int, free: int) -> DiskSpaceError:
    return DiskSpaceError(
        f"{out} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there",
        "Free some space, or give a folder on another disk.",
    )
