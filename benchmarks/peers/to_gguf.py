"""Writes a gpt-oss checkpoint (Hugging Face layout, MXFP4) as GGUF, for llama.cpp.

    ~/peers-venv/bin/python benchmarks/peers/to_gguf.py random-20b-24 random-20b-24.gguf

Experts keep their MXFP4 values bit for bit, in ggml's order; the other matrices become Q8_0; norms, biases, sinks and
the router are F32, as llama.cpp's own converter has them. There is no tokenizer in the file: it is evaluated by token
ids. Streams: one expert or 32 MiB of a matrix at a time.

Two things llama.cpp knows by architecture and not from the file, so they are checked: every other layer slides, from
the first, and swiglu's limit is 7. One it does otherwise: it rounds YaRN's correction range to whole dimensions
(`truncate`), which gpt-oss does not; speed does not depend on it, logits do a little.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
CHUNK_BYTES = 32 << 20
GROUP = 32


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file. dtype: `BF16` or `U8`; offset in bytes from the file's start."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * (2 if self.dtype == "BF16" else 1)

    def map(self) -> Array:
        """Read-only view of the file: uint16 for bfloat16, uint8 else."""
        dtype = np.uint16 if self.dtype == "BF16" else np.uint8
        return np.memmap(self.file, dtype, "r", self.offset, self.shape)


@dataclass(frozen=True)
class Converted:
    """A tensor of the GGUF. kind: its ggml type; shape: in elements, rows last but one; pieces: its bytes, in order."""

    name: str
    kind: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Array]]

    @property
    def nbytes(self) -> int:
        elements = int(np.prod(self.shape))
        return {"F32": elements * 4, "Q8_0": elements // GROUP * 34, "MXFP4": elements // GROUP * 17}[self.kind]


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """config.json and where each tensor lies, from the files' headers."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            offset = 8 + length + entry["data_offsets"][0]
            tensors[name] = Stored(file, entry["dtype"], tuple(entry["shape"]), offset)
    return config, tensors


def float32(bf16: Array) -> NDArray[np.float32]:
    return (bf16.astype(np.uint32) << 16).view(np.float32)


def ggml_mxfp4(blocks: Array, scales: Array) -> Array:
    """[rows, K/32, 16] and [rows, K/32] uint8 -> ggml's blocks, [rows, K/32, 17] (ggml-common.h, `block_mxfp4`).

    A block is its scale, then elements j and j + 16 in the low and high nibble of byte j; the checkpoint has 2j and
    2j + 1 there.
    """
    elements = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], GROUP)
    packed = elements[..., :16] | (elements[..., 16:] << 4)
    return np.concatenate([scales[..., None], packed], axis=-1)


def f32(name: str, source: Stored, step: int = 1, start: int = 0) -> Converted:
    """step, start: every step-th of the last axis, for biases of gate and up, which alternate."""
    shape = (*source.shape[:-1], len(range(start, source.shape[-1], step)))
    return Converted(name, "F32", shape, lambda: iter([float32(source.map()[..., start::step])]))


def q8_0(name: str, source: Stored) -> Converted:
    def pieces() -> Iterator[Array]:
        import gguf

        rows, columns = source.shape
        matrix, step = source.map(), max(1, CHUNK_BYTES // (columns * 4))
        for row in range(0, rows, step):
            yield gguf.quants.quantize(float32(matrix[row : row + step]), gguf.GGMLQuantizationType.Q8_0)

    return Converted(name, "Q8_0", source.shape, pieces)


def mxfp4(name: str, blocks: Stored, scales: Stored, step: int = 1, start: int = 0) -> Converted:
    """step, start: every step-th row, for gate and up, whose rows alternate."""
    experts, rows, groups, _ = blocks.shape

    def pieces() -> Iterator[Array]:
        all_blocks, all_scales = blocks.map(), scales.map()
        for e in range(experts):
            yield ggml_mxfp4(np.asarray(all_blocks[e, start::step]), np.asarray(all_scales[e, start::step]))

    return Converted(name, "MXFP4", (experts, rows // step, groups * GROUP), pieces)


def convert(config: dict[str, Any], tensors: dict[str, Stored]) -> Iterator[Converted]:
    """The tensors under llama.cpp's names."""
    yield q8_0("token_embd.weight", tensors["model.embed_tokens.weight"])
    yield f32("output_norm.weight", tensors["model.norm.weight"])
    yield q8_0("output.weight", tensors["lm_head.weight"])
    for n in range(config["num_hidden_layers"]):
        here, there = f"model.layers.{n}.", f"blk.{n}."
        yield f32(there + "attn_norm.weight", tensors[here + "input_layernorm.weight"])
        yield f32(there + "post_attention_norm.weight", tensors[here + "post_attention_layernorm.weight"])
        yield f32(there + "attn_sinks.weight", tensors[here + "self_attn.sinks"])
        for theirs, ours in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj")):
            yield q8_0(f"{there}attn_{theirs}.weight", tensors[f"{here}self_attn.{ours}.weight"])
            yield f32(f"{there}attn_{theirs}.bias", tensors[f"{here}self_attn.{ours}.bias"])
        yield f32(there + "ffn_gate_inp.weight", tensors[here + "mlp.router.weight"])
        yield f32(there + "ffn_gate_inp.bias", tensors[here + "mlp.router.bias"])
        for theirs, ours, step, start in (("gate", "gate_up", 2, 0), ("up", "gate_up", 2, 1), ("down", "down", 1, 0)):
            expert = f"{here}mlp.experts.{ours}_proj_"
            blocks, scales = tensors[expert + "blocks"], tensors[expert + "scales"]
            yield mxfp4(f"{there}ffn_{theirs}_exps.weight", blocks, scales, step, start)
            yield f32(f"{there}ffn_{theirs}_exps.bias", tensors[expert + "bias"], step, start)


def check(config: dict[str, Any], tensors: dict[str, Stored]) -> None:
    turns = ["full_attention" if n % 2 else "sliding_attention" for n in range(config["num_hidden_layers"])]
    if config.get("layer_types", turns) != turns or config.get("swiglu_limit", 7.0) != 7.0:
        sys.exit(
            "llama.cpp does not know this model: layers must slide in turn, from the first, and swiglu's limit be 7."
        )
    if not any(name.endswith("gate_up_proj_blocks") for name in tensors):
        sys.exit("Not a checkpoint in Hugging Face's MXFP4 layout.")


def set_parameters(writer: Any, config: dict[str, Any]) -> None:
    import gguf

    rope = config["rope_scaling"]
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_MXFP4_MOE)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def write(folder: Path, output: Path) -> None:
    """Writes `output`, whole or not at all."""
    import gguf

    config, tensors = read_checkpoint(folder)
    check(config, tensors)
    converted = list(convert(config, tensors))
    partial = output.with_name(output.name + ".part")
    writer = gguf.GGUFWriter(partial, "gpt-oss")
    set_parameters(writer, config)
    for tensor in converted:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # GGUFWriter takes whole tensors only; the embedding alone is 2.3 GB in float32.
    file = writer.fout[0]
    for tensor in converted:
        writer.write_padding(file, file.tell())
        start = file.tell()
        for piece in tensor.pieces():
            file.write(np.ascontiguousarray(piece))
        if file.tell() - start != tensor.nbytes:
            sys.exit(f"{tensor.name}: {file.tell() - start} bytes instead of {tensor.nbytes}")
        print(f"{tensor.kind:6} {tensor.nbytes:12,} {tensor.name}", file=sys.stderr)
    writer.write_padding(file, file.tell())
    file.flush()
    os.fsync(file.fileno())
    writer.close()
    partial.replace(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write(arguments.checkpoint, arguments.output)


if __name__ == "__main__":
    main()
