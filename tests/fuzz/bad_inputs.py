"""Bad inputs by name, each made from a good one by a few lines, and the error that it has to get.

python tests/fuzz/bad_inputs.py        # the table of docs/security.md
"""

# A table reads best with a row a line.
# ruff: noqa: E501

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_export.exporter import errors
from gptoss_export.exporter.artifact import Manifest, ParityRecord, write_manifest
from gptoss_export.exporter.checkpoint.open import open_checkpoint
from gptoss_export.exporter.checkpoint.synth import SynthShape, synthesize
from gptoss_export.exporter.weights import WeightsMode, hash_files
from gptoss_export.validators.probes import Probe
from gptoss_export.validators.reference import trace_shape
from gptoss_export.validators.trace import Peak, TraceWriter

TINY = Path(__file__).parents[1] / "data" / "tiny-gpt-oss"
SHAPE = SynthShape(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_layers=1, num_experts=2, top_k=1, num_heads=2,
    num_kv_heads=1, head_dim=16,
)  # fmt: skip
DEEP = b'{"a":' * 5000
USAGE = "usage error"
AGAIN = "none: made again"
KEY = "0" * 64
PROBES = (Probe("one", (1,)),)

Edit = Callable[["Bed"], object]


@dataclass(frozen=True)
class Bed:
    """A good checkpoint, a good artifact of it and a folder for other files, all of them this case's own."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def release(self) -> Path:
        return self.root / "release"

    @property
    def secret(self) -> Path:
        return self.root / "secret"

    @property
    def given(self) -> Path:
        return self.root / "given"

    @property
    def prompts(self) -> Path:
        return self.root / "given.jsonl"

    @property
    def entry(self) -> Path:
        return self.root / "cache" / KEY

    @property
    def shard(self) -> Path:
        return sorted(self.model.glob("*.safetensors"))[0]


@dataclass(frozen=True)
class Case:
    """name, what it is, the command that meets it, what makes it, the class of the error."""

    name: str
    what: str
    command: str
    edit: Edit
    error: str

    @property
    def exit_code(self) -> int:
        if self.error in (USAGE, AGAIN):
            return 2 if self.error == USAGE else 0
        found: type[errors.GptossExportError] = getattr(errors, self.error)
        return found.exit_code


def make_bed(root: Path) -> Bed:
    """What `Case.edit` breaks: the checkpoint in two shards, and an artifact with a graph that reads its weights."""
    bed = Bed(root)
    synthesize(bed.model, SHAPE, shard_bytes=12_000)
    for name in ("tokenizer.json", "generation_config.json"):
        content = (TINY / name).read_bytes() if name == "tokenizer.json" else b'{"eos_token_id": [2]}'
        (bed.model / name).write_bytes(content)
    weights = bed.release / "weights"
    weights.mkdir(parents=True)
    for path in bed.model.iterdir():
        (weights / path.name).write_bytes(path.read_bytes())
    (bed.release / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    (bed.release / "model.onnx").write_bytes(graph({"location": f"weights/{bed.shard.name}", "offset": "0"}))
    bed.secret.write_bytes(bytes(64))
    seal(bed)
    _make_entry(bed)
    return bed


def _make_entry(bed: Bed) -> None:
    """A run of the reference in the cache, of a trace of zeros."""
    config = open_checkpoint(bed.model).config
    bed.entry.mkdir(parents=True)
    shape = trace_shape(config, PROBES)
    writer = TraceWriter(bed.entry, shape, "states")
    for name, (layers, *rows) in shape.arrays("states").items():
        for _ in range(layers):
            writer.append(name, np.zeros(rows, np.float32))
    writer.finish({"router": (Peak(1.0, 0),)})
    sign_entry(bed)


def sign_entry(bed: Bed) -> None:
    """An index that fits the entry's files, as whoever can write them can make."""
    files = {p.name: p for p in bed.entry.iterdir() if p.name != "index.json"}
    records = hash_files(files)
    index = {"key": KEY, "files": {name: record.sha256 for name, record in records.items()}}
    (bed.entry / "index.json").write_text(json.dumps(index))


def graph(external: dict[str, str], *more: tuple[str, str], in_function: bool = False) -> bytes:
    """model.onnx with one tensor whose data are said to be there."""
    from onnx import TensorProto, helper

    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (*external.items(), *more):
        tensor.external_data.add(key=key, value=value)
    if in_function:
        node = helper.make_node("Constant", [], ["y"], value=tensor)
        function = helper.make_function("com.gptoss", "F", [], ["y"], [node], [helper.make_opsetid("", 20)])
        return bytes(helper.make_model(helper.make_graph([], "g", [], []), functions=[function]).SerializeToString())
    return bytes(helper.make_model(helper.make_graph([], "g", [], [], [tensor])).SerializeToString())


def seal(bed: Bed, target: str = "onnx", **changes: Any) -> None:
    """Writes a manifest that fits the files, as whoever made the artifact can."""
    checkpoint = open_checkpoint(bed.model)
    folder = bed.release
    paths = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    paths.pop("manifest.json", None)
    files = hash_files(paths)
    fields: dict[str, Any] = {
        "versions": {"gptoss-export": "0.1.0"}, "target": target, "engine": "onnxruntime 1.31.1",
        "provider": "CPUExecutionProvider", "notes": (), "layout": checkpoint.layout, "model": checkpoint.config,
        "checkpoint": {name[8:]: record for name, record in files.items() if name.startswith("weights/")},
        "weights_mode": WeightsMode.COPY, "weights_dir": "weights", "files": files,
        "parity": ParityRecord("not validated"), "created_at": "2026-01-02T03:04:05+00:00",
    }  # fmt: skip
    write_manifest(Manifest(**(fields | changes)), folder)


def _json(path: str, edit: Callable[[Any], object]) -> Edit:
    def apply(bed: Bed) -> None:
        file = bed.root / path
        document = json.loads(file.read_bytes())
        edit(document)
        file.write_text(json.dumps(document))

    return apply


def _bytes(path: str, data: bytes) -> Edit:
    return lambda bed: _replace(bed.root / path).write_bytes(data)


def _replace(path: Path) -> Path:
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _config(name: str, what: str, edit: Callable[[Any], object], error: str = "ConfigError") -> Case:
    return Case(f"config: {name}", what, "export", _json("model/config.json", edit), error)


def _raw(reader: str, path: str, command: str, error: str) -> list[Case]:
    """What no JSON file may be."""
    kinds = {
        "empty": ("no bytes", b""),
        "twice": ("a key that is there twice", b'{"a": 1, "a": 2}'),
        "NaN": ("NaN for a number", b'{"a": NaN}'),
        "deep": ("5000 objects, one in the other", DEEP),
        "digits": ("an integer of 5000 digits", b'{"a": ' + b"9" * 5000 + b"}"),
    }
    return [Case(f"{reader}: {n}", what, command, _bytes(path, data), error) for n, (what, data) in kinds.items()]


def _link(path: str, target: str, hard: bool = False) -> Edit:
    def apply(bed: Bed) -> None:
        file = _replace(bed.root / path)
        if hard:
            os.link(bed.root / target, file)
        else:
            file.symlink_to(target if target.startswith("/") else bed.root / target)

    return apply


def _fifo(path: str) -> Edit:
    return lambda bed: os.mkfifo(_replace(bed.root / path))


CONFIG = [
    *_raw("config", "model/config.json", "export", "ConfigError"),
    _config("other network", "model_type is llama", lambda c: c.update(model_type="llama")),
    _config("boolean", "true for a number of heads", lambda c: c.update(num_attention_heads=True)),
    _config("negative", "a vocabulary of -1", lambda c: c.update(vocab_size=-1)),
    _config("absurd", "2^62 layers", lambda c: c.update(num_hidden_layers=2**62), "AbsurdSizeError"),
    _config("wide", "a hidden size of 2^31", lambda c: c.update(hidden_size=2**31), "AbsurdSizeError"),
    _config("more layers", "1000 layers, and weights of one", lambda c: c.update(num_hidden_layers=1000, layer_types=None), "MissingTensorError"),
    _config("nested type", "a list for a layer's type", lambda c: c.update(layer_types=[[[]]])),
    Case("config: FIFO", "a FIFO that would block the reader", "export", _fifo("model/config.json"), "UnsafeFileError"),
    Case("config: device", "a link to /dev/zero", "export", _link("model/config.json", "/dev/zero"), "UnsafeFileError"),
    Case("config: folder", "a folder", "export", lambda b: _replace(b.model / "config.json").mkdir(), "UnsafeFileError"),
    Case("config: 5 MB", "more bytes than any can need", "export", _bytes("model/config.json", b" " * (5 << 20)), "ConfigError"),
    Case("generation config: text", "eos_token_id is text", "export", _bytes("model/generation_config.json", b'{"eos_token_id": "2"}'), "ConfigError"),
    Case("generation config: outside", "an end token beyond the vocabulary", "export", _bytes("model/generation_config.json", b'{"eos_token_id": 64}'), "ConfigError"),
    Case("generation config: NaN", "NaN for a token", "export", _bytes("model/generation_config.json", b'{"eos_token_id": NaN}'), "ConfigError"),
]  # fmt: skip


def _shard_as(name: str) -> Edit:
    def edit(index: Any) -> None:
        index["weight_map"][next(iter(index["weight_map"]))] = name

    return _json("model/model.safetensors.index.json", edit)


INDEX = [
    *_raw("index", "model/model.safetensors.index.json", "export", "ShardIndexError"),
    Case("index: parent", "a shard named ../x.safetensors", "export", _shard_as("../x.safetensors"), "ShardIndexError"),
    Case("index: absolute", "a shard named /etc/x.safetensors", "export", _shard_as("/etc/x.safetensors"), "ShardIndexError"),
    Case("index: backslash", "a shard named ..\\x.safetensors", "export", _shard_as("..\\x.safetensors"), "ShardIndexError"),
    Case("index: missing", "a shard that is not there", "export", _shard_as("none.safetensors"), "ShardIndexError"),
]  # fmt: skip


def _header(edit: Callable[[dict[str, Any]], object]) -> Edit:
    """The first shard with another header, whose length is right."""

    def apply(bed: Bed) -> None:
        data = bed.shard.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        bed.shard.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return apply


def _first(**fields: Any) -> Edit:
    return _header(lambda h: h[_tensors(h)[0]].update(fields))


def _tensors(header: dict[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def _overlap(header: dict[str, Any]) -> None:
    first, second = _tensors(header)[:2]
    begin, end = header[second]["data_offsets"]
    assert header[first]["data_offsets"][1] == begin
    header[second]["data_offsets"] = [begin - 2, end - 2]


def _shard(change: Callable[[bytes], bytes]) -> Edit:
    return lambda bed: bed.shard.write_bytes(change(bed.shard.read_bytes()))


def _export(name: str, what: str, edit: Edit, error: str) -> Case:
    return Case(f"weights: {name}", what, "export", edit, error)


WEIGHTS = [
    _export("header bomb", "a header of 2^60 bytes", _shard(lambda d: struct.pack("<Q", 1 << 60) + d[8:]), "HeaderError"),
    _export("header beyond", "a header longer than its file", _shard(lambda d: struct.pack("<Q", len(d)) + d[8:]), "TruncatedFileError"),
    _export("empty", "no bytes", _shard(lambda d: b""), "TruncatedFileError"),
    _export("LFS pointer", "a Git LFS pointer", _shard(lambda d: b"version https://git-lfs.github.com/spec/v1\n"), "HeaderError"),
    _export("deep", "a header of 4000 objects, one in the other", _shard(lambda d: struct.pack("<Q", 20_000) + (DEEP * 2)[:20_000]), "HeaderError"),
    _export("wrap", "a shape whose product is 2^96", _first(shape=[2**32, 2**32, 2**32]), "HeaderError"),
    _export("backwards", "a range that ends before it begins", _first(data_offsets=[8, 0]), "HeaderError"),
    _export("beyond", "a range beyond 2^62", _first(shape=[2**61], data_offsets=[0, 2**62], dtype="BF16"), "OverlappingTensorError"),
    _export("overlap", "two tensors that share two bytes", _header(_overlap), "OverlappingTensorError"),
    _export("dtype", "a type that nobody has", _first(dtype="PICKLE"), "HeaderError"),
    _export("cut", "a file without its last byte", _shard(lambda d: d[:-1]), "TruncatedFileError"),
    _export("trailing", "bytes that are no tensor's", _shard(lambda d: d + b"x"), "HeaderError"),
    _export("surplus", "a tensor that no gpt-oss has", _header(lambda h: h.update({"x": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}})), "SurplusTensorError"),
    _export("link out", "a shard that is a link out of the folder", lambda b: _link(f"model/{b.shard.name}", "secret")(b), "UnsafeFileError"),
    _export("link nowhere", "a shard that is a link to nothing", lambda b: _link(f"model/{b.shard.name}", "model/none")(b), "UnsafeFileError"),
    _export("FIFO", "a shard that is a FIFO", lambda b: _fifo(f"model/{b.shard.name}")(b), "UnsafeFileError"),
    _export("pickle", "weights as a pickle alone", lambda b: [p.unlink() for p in b.model.glob("*.safetensors*")] + [(b.model / "pytorch_model.bin").write_bytes(b"\x80\x04")], "UnsafeFileError"),
]  # fmt: skip

TOKENIZER = [
    Case("tokenizer: link out", "a link to a private file, which an export would publish", "export", _link("model/tokenizer.json", "secret"), "UnsafeFileError"),
    Case("tokenizer: device", "a link to /dev/zero", "export", _link("model/tokenizer.json", "/dev/zero"), "UnsafeFileError"),
    Case("chat template: link out", "a link to /etc/passwd", "export", _link("model/chat_template.jinja", "/etc/passwd"), "UnsafeFileError"),
    Case("tokenizer: FIFO", "a FIFO", "export", _fifo("model/tokenizer.json"), "UnsafeFileError"),
    Case("tokenizer: deep", "5000 objects, one in the other", "validate", lambda b: (b.release / "weights/tokenizer.json").write_bytes(b'{"version": "1.0", "model": ' + b"[" * 5000) and seal(b), "TokenizerError"),
    Case("tokenizer: escape", "a version that is a terminal's escape sequence", "validate", lambda b: (b.release / "weights/tokenizer.json").write_bytes(b'{"version": "\\u001b[2J"}') and seal(b), "TokenizerError"),
]  # fmt: skip


def _prompt(name: str, what: str, data: bytes) -> Case:
    return Case(f"prompts: {name}", what, "prompts", _bytes("given.jsonl", data), "PromptError")


PROMPTS = [
    _prompt("empty", "no bytes", b""),
    _prompt("twice", "a key that is there twice", b'{"ids": [1], "ids": [2]}'),
    _prompt("NaN", "NaN for a token", b"[NaN]"),
    _prompt("digits", "a token of 5000 digits", b"[" + b"9" * 5000 + b"]"),
    _prompt("deep", "50000 lists, one in the other", b"[" * 50_000),
    _prompt("outside", "a token beyond the vocabulary", b"[64]"),
    _prompt("long", "2000 tokens", b"[" + b"1," * 1999 + b"1]"),
    _prompt("many", "300 prompts", b"[1]\n" * 300),
    _prompt("escape", "a name that is a terminal's escape sequence", b'{"ids": [1], "name": "\\u001b[2J"}'),
    _prompt("17 MB", "more bytes than any can need", b" " * (17 << 20)),
    Case("prompts: FIFO", "a FIFO", "prompts", _fifo("given.jsonl"), "PromptError"),
]


def _manifest(edit: Callable[[Any], object]) -> Edit:
    """Another manifest, with its own hash put right, which is no secret."""

    def apply(bed: Bed) -> None:
        from gptoss_export.exporter import artifact

        path = bed.release / "manifest.json"
        raw = json.loads(path.read_bytes())
        edit(raw)
        with suppress(errors.ManifestError):
            raw["content_sha256"] = artifact._from_dict(raw).content_sha256
        path.write_text(json.dumps(raw))

    return apply


def _inspect(name: str, what: str, edit: Edit, error: str = "ManifestError") -> Case:
    return Case(f"manifest: {name}", what, "inspect", edit, error)


ENTRY = {"nbytes": 1, "sha256": "0" * 64}
MANIFEST = [
    *_raw("manifest", "release/manifest.json", "inspect", "ManifestError"),
    _inspect("parent", "a file named ../secret", _manifest(lambda m: m["files"].update({"../secret": ENTRY}))),
    _inspect("absolute", "a file named /etc/passwd", _manifest(lambda m: m["files"].update({"/etc/passwd": ENTRY}))),
    _inspect("long name", "a file whose name has 300 bytes", _manifest(lambda m: m["files"].update({"n" * 300: ENTRY}))),
    _inspect("many files", "600 files, which could not all be open", _manifest(lambda m: m["files"].update({f"f{i}": ENTRY for i in range(600)}))),
    _inspect("weights elsewhere", "weights in /", _manifest(lambda m: m["weights"].update(dir="/"))),
    _inspect("escape", "a note that is a terminal's escape sequence", _manifest(lambda m: m.update(notes=["\x1b]0;x\x07"]))),
    _inspect("nested note", "a note that is 900 lists", _manifest(lambda m: m.update(notes=[json.loads("[" * 900 + "]" * 900)]))),
    _inspect("vocabulary", "a vocabulary of 10^19", _manifest(lambda m: m["model"].update(vocab_size=10**19))),
    _inspect("verdict", "a verdict that somebody else wrote", _json("release/manifest.json", lambda m: m["parity"].update(loosened=["x"])), "IntegrityError"),
    _inspect("FIFO", "a FIFO", _fifo("release/manifest.json")),
    _inspect("link", "a link to another manifest", lambda b: (b.release / "manifest.json").rename(b.given) and _link("release/manifest.json", "given")(b)),
    _inspect("version", "a schema of the year 3000", _manifest(lambda m: m.update(schema_version=3000))),
]  # fmt: skip


def _graph(external: dict[str, str], *more: tuple[str, str], prepare: Edit = lambda bed: None, **how: bool) -> Edit:
    def apply(bed: Bed) -> None:
        prepare(bed)
        (bed.release / "model.onnx").write_bytes(graph(external, *more, **how))
        seal(bed)

    return apply


def _behind_folder_link(bed: Bed) -> None:
    (bed.root / "elsewhere").mkdir()
    (bed.root / "elsewhere" / "data").write_bytes(bytes(64))
    (bed.release / "folder").symlink_to(bed.root / "elsewhere")


def _external(name: str, what: str, edit: Edit, commands: str = "generate") -> list[Case]:
    return [Case(f"graph: {name} ({c})", what, c, edit, "IntegrityError") for c in commands.split()]


GRAPH = [
    *_external("parent", "external data at ../secret (CVE-2022-25882, CVE-2024-27318, CVE-2025-51480)", _graph({"location": "../secret"}), "generate bench validate"),
    *_external("dots within", "external data at weights/../../secret (CVE-2024-27318)", _graph({"location": "weights/../../secret"})),
    *_external("absolute", "external data at /etc/passwd", _graph({"location": "/etc/passwd"}), "generate validate"),
    *_external("link", "external data that is a symbolic link (CVE-2026-34447)", _graph({"location": "data"}, prepare=_link("release/data", "secret")), "generate bench validate"),
    *_external("folder link", "external data behind a folder that is a link (CVE-2026-27489)", _graph({"location": "folder/data"}, prepare=_behind_folder_link), "generate bench"),
    *_external("hard link", "external data that is a hard link (CVE-2026-34446)", _graph({"location": "data"}, prepare=_link("release/data", "secret", hard=True)), "generate bench validate"),
    *_external("unlisted", "external data in a file that the manifest does not list", lambda b: (_graph({"location": "data"})(b), (b.release / "data").write_bytes(bytes(64)))),
    *_external("injection", "a key `__class__` beside the location (CVE-2026-34445)", _graph({"location": "tokenizer.json"}, ("__class__", "x")), "generate validate"),
    *_external("other key", "a key `basepath` beside the location (CVE-2026-34445)", _graph({"location": "tokenizer.json"}, ("basepath", "/etc"))),
    *_external("twice", "two locations", _graph({"location": "tokenizer.json"}, ("location", "../secret"))),
    *_external("memory", "ONNX Runtime's mark for data at an address in memory", _graph({"location": "*/_ORT_MEM_ADDR_/*", "offset": "4096"})),
    *_external("length", "a length beyond the file's end", _graph({"location": "tokenizer.json", "length": "999999999"})),
    *_external("offset", "an offset of 30 digits", _graph({"location": "tokenizer.json", "offset": "9" * 30})),
    *_external("negative", "an offset of -8", _graph({"location": "tokenizer.json", "offset": "-8"})),
    *_external("function", "external data of a constant in a function's body", _graph({"location": "../secret"}, in_function=True)),
    Case("graph: no ONNX", "bytes that are no ONNX", "generate", lambda b: (b.release / "model.onnx").write_bytes(b"\xff" * 99) and seal(b), "SessionError"),
    Case("graph: another's", "a graph without inputs", "generate", lambda b: (b.release / "model.onnx").write_bytes(graph({"location": f"weights/{b.shard.name}", "offset": "0", "length": "16"})) and seal(b), "SessionError"),
    Case("graph: swapped", "another graph than the manifest's", "validate", lambda b: (b.release / "model.onnx").write_bytes(b"x"), "IntegrityError"),
    Case("weights file: one bit", "one bit of a shard", "validate", lambda b: _flip(b.release / "weights" / b.shard.name), "IntegrityError"),
    Case("weights file: link", "a shard that is a link to its own bytes", "validate", lambda b: _link(f"release/weights/{b.shard.name}", f"model/{b.shard.name}")(b), "IntegrityError"),
]  # fmt: skip


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _engine(edit: Callable[[Any], object]) -> Edit:
    def apply(bed: Bed) -> None:
        fields = {
            "schema_version": 1, "flavor": "rtx", "version": "1.7.1.116", "compute_capabilities": ["8.0+"],
            "dtype": "fp16", "engine_weights": "external", "max_batch": 2, "max_prompt": 512, "max_context": 4096,
            "max_logits": 128, "plugin": True, "engine_sha256": "0" * 64,
            "inputs": {"w": {"file": "tokenizer.json", "dtype": "U8", "shape": [8], "offset": 0, "nbytes": 8}},
        }  # fmt: skip
        edit(fields)
        (bed.release / "engine.json").write_text(json.dumps(fields))
        seal(bed, "trt-fp16")

    return apply


def _input(**fields: Any) -> Edit:
    return _engine(lambda e: e["inputs"]["w"].update(fields))


ENGINE = [
    Case("engine.json: parent", "a weights file ../secret", "generate", _input(file="../secret"), "ManifestError"),
    Case("engine.json: absolute", "a weights file /dev/zero", "generate", _input(file="/dev/zero"), "ManifestError"),
    Case("engine.json: shape", "a shape whose product is 2^80", "generate", _input(shape=[2**40, 2**40]), "ManifestError"),
    Case("engine.json: offset", "an offset of 2^62", "generate", _input(offset=2**62), "ManifestError"),
    Case("engine.json: batch", "a batch of 10^9", "generate", _engine(lambda e: e.update(max_batch=10**9)), "ManifestError"),
    Case("engine.json: deep", "5000 objects, one in the other", "generate", lambda b: (b.release / "engine.json").write_bytes(DEEP) and seal(b, "trt-fp16"), "ManifestError"),
    Case("engine.json: link", "a link to another", "generate", lambda b: (seal(b, "trt-fp16"), _link("release/engine.json", "secret")(b)), "IntegrityError"),
    Case("engine.plan: pickle", "a pickle", "plan", _bytes("given", b"\x80\x04pickle" * 9), "EngineMismatchError"),
    Case("engine.plan: size", "a header that says 2^64 - 1 bytes", "plan", _bytes("given", struct.pack("<4s12xQ4s4sQ24x", b"vtrt", 2**64 - 1, bytes(4), b"vtrt", 0)), "EngineMismatchError"),
    Case("engine.plan: FIFO", "a FIFO", "plan", _fifo("given"), "UnsafeFileError"),
]  # fmt: skip

REPORT = [
    *_raw("report", "given/parity.json", "report", "NotValidatedError"),
    Case("report: other", "an object that is no report", "report", _bytes("given/parity.json", b"{}"), "NotValidatedError"),
    Case("report: 65 MB", "more bytes than any can need", "report", _bytes("given/parity.json", b" " * (65 << 20)), "NotValidatedError"),
    Case("report: FIFO", "a FIFO", "report", lambda b: b.given.mkdir() or _fifo("given/parity.json")(b), "NotValidatedError"),
    Case("polygraphy: class", "an object of a class that runs commands", "polygraphy", _bytes("given", b'{"polygraphy_class": "os.system", "lst": ["ls"]}'), "PromptError"),
    Case("polygraphy: pickle", "a pickle for an array", "polygraphy", _bytes("given", b'{"polygraphy_class": "RunResults", "lst": [["r", [{"outputs": {"logits": {"array": "gASV", "polygraphy_class": "ndarray"}}}]]]}'), "PromptError"),
    Case("polygraphy: deep", "5000 objects, one in the other", "polygraphy", _bytes("given", DEEP), "PromptError"),
    Case("polygraphy: none", "a file that is not there", "polygraphy", lambda b: None, "PromptError"),
]  # fmt: skip


def _option(name: str, what: str, data: bytes) -> Case:
    return Case(f"config file: {name}", what, "options", _bytes("given", data), USAGE)


OPTIONS = [
    _option("bomb", "aliases of aliases", b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"),
    _option("object", "a tag that runs a command", b"model: !!python/object/apply:os.system [ls]\n"),
    _option("deep", "50000 lists, one in the other", b"[" * 50_000),
    _option("escape", "a character beyond Unicode", b'model: "\\UFFFFFFFF"\n'),
    _option("NUL", "a path with a NUL", b'output: "a\\0b"\n'),
    _option("65 KB", "more bytes than any can need", b"# " * 33_000),
    _option("twice", "an option that is there twice", b"model: a\nmodel: b\n"),
    Case("config file: FIFO", "a FIFO", "options", _fifo("given"), USAGE),
]


def _cached(name: str, what: str, edit: Edit) -> Case:
    return Case(f"cache: {name}", what, "cache", edit, AGAIN)


def _array(change: Callable[[bytes], bytes]) -> Edit:
    def apply(bed: Bed) -> None:
        path = bed.entry / "final.npy"
        path.write_bytes(change(path.read_bytes()))
        sign_entry(bed)

    return apply


CACHE = [
    _cached("index", "an index of 5000 objects, one in the other", lambda b: (b.entry / "index.json").write_bytes(DEEP)),
    _cached("one bit", "one bit of an array", lambda b: _flip(b.entry / "final.npy")),
    _cached("pickle", "an array of pickled objects, with its hash", _array(lambda d: d.replace(b"<f4", b"|O4"))),
    _cached("code", "an array whose header is an expression, with its hash", _array(lambda d: d.replace(b"{'descr'", b"{f()or'd"))),
    _cached("shape", "an array of another shape, with its hash", _array(lambda d: d.replace(b"(1, 1, 32)", b"(9, 1, 32)"))),
    _cached("peaks", "text for a figure, with its hash", lambda b: ((b.entry / "peaks.json").write_text('{"router": [["inf", 0]]}'), sign_entry(b))),
    _cached("FIFO", "a FIFO for an array", lambda b: os.mkfifo(_replace(b.entry / "final.npy"))),
    _cached("stranger", "a file that the index does not name", lambda b: (b.entry / "x").write_bytes(b"x")),
]  # fmt: skip

CASES = [*CONFIG, *INDEX, *WEIGHTS, *TOKENIZER, *PROMPTS, *MANIFEST, *GRAPH, *ENGINE, *REPORT, *CACHE, *OPTIONS]


def table() -> str:
    """All cases as Markdown."""
    rows = [f"| {c.name} | {c.what.replace('|', '/')} | `{c.error}` | {c.exit_code} |" for c in CASES]
    return "\n".join(["| bad input | what it is | error | exit code |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(table(), file=sys.stdout)
