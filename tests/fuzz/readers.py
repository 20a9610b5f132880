"""Every reader of a file that somebody else wrote: what it reads when all is well, and what it may raise otherwise.

readers = make_readers(folder)            # folders to read in, small valid documents
readers["manifest"].check(data)           # a valid result or a typed error; anything else propagates
"""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import click

from gptoss_export.engines.external_data import read_model
from gptoss_export.engines.tensorrt.header import read_header as read_engine_header
from gptoss_export.engines.tensorrt.metadata import EngineInput, EngineMetadata, read_metadata, write_metadata
from gptoss_export.exporter import cli
from gptoss_export.exporter.artifact import Manifest, ParityRecord, read_manifest, write_manifest
from gptoss_export.exporter.checkpoint.config import parse_config
from gptoss_export.exporter.checkpoint.json_reader import read_json_object
from gptoss_export.exporter.checkpoint.links import AllowedPlaces
from gptoss_export.exporter.checkpoint.open import MAX_CONFIG_BYTES, open_checkpoint
from gptoss_export.exporter.checkpoint.safetensors_header import read_header
from gptoss_export.exporter.checkpoint.shards import find_shards
from gptoss_export.exporter.checkpoint.synth import SynthShape, synthesize
from gptoss_export.exporter.checkpoint.tokenizer import read_tokenizer
from gptoss_export.exporter.commands.config_file import load_defaults
from gptoss_export.exporter.errors import GptossExportError, ManifestError
from gptoss_export.exporter.weights import WeightsMode, hash_files
from gptoss_export.validators.polygraphy_json import read_logits, write_results
from gptoss_export.validators.prompts import read_prompts
from gptoss_export.validators.report import read_report, to_json
from gptoss_export.validators.trace import Peak, Trace, TraceShape, TraceWriter

HERE = Path(__file__).parent
TINY = HERE.parent / "data" / "tiny-gpt-oss"
CORPUS = HERE / "corpus"
SHAPE = SynthShape(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_layers=1, num_experts=2, top_k=1, num_heads=2,
    num_kv_heads=1, head_dim=16,
)  # fmt: skip
ENGINE = EngineMetadata(
    flavor="rtx", version="1.7.1.116", compute_capabilities=("8.0+",), dtype="fp16", engine_weights="external",
    max_batch=2, max_prompt=512, max_context=4096, max_logits=128, plugin=True, engine_sha256="0" * 64,
    inputs={"model.embed_tokens.weight": EngineInput("weights/model.safetensors", "BF16", (8, 4), 128, 64)},
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """One reader. seed: a valid document. kind: how `mutate` changes it. errors: what it may raise besides ours."""

    name: str
    kind: str
    seed: bytes
    path: Path
    read: Callable[[], object]
    errors: tuple[type[Exception], ...] = ()

    def check(self, data: bytes) -> bool:
        """Whether it was read; False for a typed error, which has its two lines. All else propagates."""
        self.path.write_bytes(data)
        try:
            self.read()
        except GptossExportError as error:
            assert error.what.isprintable(), error.what
            assert error.next_step.isprintable()
            assert len(error.what) < 2000, len(error.what)
            assert error.exit_code >= 10
            return False
        except self.errors as error:
            assert not isinstance(error, click.ClickException) or error.message.isprintable()
            return False
        return True

    def corpus(self) -> list[Path]:
        """What is replayed before anything new is tried."""
        return sorted((CORPUS / self.name).iterdir())


def load(name: str, path: Path) -> ModuleType:
    """A module by its file: tests are no package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_readers(root: Path) -> dict[str, Reader]:
    """All readers, each with a folder of its own below `root`."""
    made = [*_checkpoint(root), *_artifact(root), *_others(root)]
    return {reader.name: reader for reader in made}


def _checkpoint(root: Path) -> list[Reader]:
    folder = root / "checkpoint"
    synthesize(folder, SHAPE, shard_bytes=4096)
    config, index = folder / "config.json", folder / "model.safetensors.index.json"
    shard = sorted(folder.glob("*.safetensors"))[0]
    (alone := root / "alone").mkdir()
    raw = json.loads((TINY / "config.json").read_bytes())
    tiny = (TINY / "config.json").read_bytes()

    def read_config() -> object:
        return parse_config(read_json_object(alone / "config.json", MAX_CONFIG_BYTES))

    def read_generation() -> object:
        return parse_config(raw, read_json_object(alone / "generation_config.json", MAX_CONFIG_BYTES))

    (copy := root / "whole").mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return [
        Reader("config", "json", tiny, alone / "config.json", read_config),
        Reader(
            "generation_config", "json", (TINY / "generation_config.json").read_bytes(),
            alone / "generation_config.json", read_generation,
        ),
        Reader("index", "json", index.read_bytes(), index, lambda: find_shards(folder, AllowedPlaces.of(folder))),
        Reader(
            "safetensors", "safetensors", shard.read_bytes(), alone / "x.safetensors",
            lambda: read_header(alone / "x.safetensors"),
        ),
        Reader("checkpoint", "json", config.read_bytes(), copy / "config.json", lambda: open_checkpoint(copy)),
        Reader(
            "tokenizer", "json", (TINY / "tokenizer.json").read_bytes(), alone / "tokenizer.json",
            lambda: read_tokenizer(alone / "tokenizer.json", "next").encode("a few words, 12 of them"),
        ),
    ]  # fmt: skip


def _artifact(root: Path) -> list[Reader]:
    (folder := root / "artifact").mkdir()
    checkpoint = open_checkpoint(TINY)
    (folder / "weights").mkdir()
    (folder / "weights" / "data.bin").write_bytes(bytes(64))
    manifest = Manifest(
        versions={"gptoss-export": "0.1.0"}, target="onnx", engine="onnxruntime 1.31.1",
        provider="CPUExecutionProvider", notes=("a note",), layout=checkpoint.layout, model=checkpoint.config,
        checkpoint={}, weights_mode=WeightsMode.COPY, weights_dir="weights",
        files=hash_files({"weights/data.bin": folder / "weights" / "data.bin"}),
        parity=ParityRecord("not validated"), created_at="2026-01-02T03:04:05+00:00",
    )  # fmt: skip
    write_manifest(manifest, folder)
    (root / "engine").mkdir()
    (root / "report").mkdir()
    (unlisted := root / "unlisted").mkdir()
    (unlisted / "weights").mkdir()
    (unlisted / "weights" / "data.bin").write_bytes(bytes(64))
    made = load("made_up_reports", HERE.parent / "unit" / "conftest.py").made_report()
    plan = struct.pack("<4s12xQ4s4sQ24x", b"vtrt", 64, bytes((1, 7, 1, 116)), b"vtrt", 0x7E)
    return [
        Reader(
            "manifest", "json", (folder / "manifest.json").read_bytes(), folder / "manifest.json",
            lambda: _manifest(folder),
        ),
        Reader("model", "onnx", _model(), unlisted / "model.onnx", lambda: read_model(unlisted)),
        Reader(
            "engine_json", "json", write_metadata(ENGINE, root / "engine").read_bytes(),
            root / "engine" / "engine.json",
            lambda: read_metadata(root / "engine"),
        ),
        Reader(
            "engine_plan", "bytes", plan, root / "engine" / "engine.plan",
            lambda: read_engine_header(root / "engine" / "engine.plan").compute_capabilities,
        ),
        Reader("report", "json", to_json(made), root / "report" / "parity.json", lambda: read_report(root / "report")),
    ]  # fmt: skip


def _manifest(folder: Path) -> object:
    """Reads it with its own hash put right, which anybody can do: all checks behind the hash are reached."""
    from gptoss_export.exporter import artifact

    try:
        raw = json.loads((folder / "manifest.json").read_bytes())
        again = asdict(artifact._from_dict(raw)) and artifact._from_dict(raw).content_sha256
    except (ValueError, RecursionError, AttributeError, ManifestError):
        return read_manifest(folder)
    (folder / "manifest.json").write_text(json.dumps(raw | {"content_sha256": again}), encoding="ascii")
    return read_manifest(folder)


def _model() -> bytes:
    from onnx import TensorProto, helper

    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "weights/data.bin"), ("offset", "16"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    constant = helper.make_node("Constant", [], ["y"], value=helper.make_tensor("c", TensorProto.FLOAT, [1], [1.0]))
    function = helper.make_function("com.gptoss", "F", [], ["y"], [constant], [helper.make_opsetid("", 20)])
    graph = helper.make_graph([], "g", [], [], [tensor])
    return bytes(helper.make_model(graph, functions=[function]).SerializeToString())


def _others(root: Path) -> list[Reader]:
    import numpy as np

    (folder := root / "others").mkdir()
    checkpoint = open_checkpoint(TINY)
    (entry := root / "entry").mkdir()
    shape = TraceShape((2, 1), 1, 4, 2)
    writer = TraceWriter(entry, shape, "routing")
    writer.append("router_logits", np.zeros((3, 2), np.float32))
    writer.append("final", np.zeros((3, 4), np.float32))
    writer.finish({"router": (Peak(1.0, 0),)})
    with (folder / "logits.json").open("w") as file:
        write_results(file, "onnxrt", (1, 2, 4), [np.zeros((2, 4), np.float32)])
    prompts = b'{"text": "The capital of France is", "name": "paris"}\n{"ids": [9, 28, 32]}\n[976, 90, 2]\n'
    options = b"target: [onnx, ort-cpu]\nmodel: ./gpt-oss-20b\nparity: full\nvalidate:\n  threads: 2\n"

    def read_trace() -> object:
        return Trace(entry, shape, "routing").final(1)

    def read_options() -> object:
        context = click.Context(cli.cli)
        return load_defaults(context, cli.cli.params[0], folder / "options.yaml")

    return [
        Reader(
            "prompts", "jsonl", prompts, folder / "prompts.jsonl",
            lambda: read_prompts(folder / "prompts.jsonl", checkpoint),
        ),
        Reader("options", "bytes", options, folder / "options.yaml", read_options, (click.BadParameter,)),
        Reader("trace", "bytes", (entry / "final.npy").read_bytes(), entry / "final.npy", read_trace, (ValueError,)),
        Reader("peaks", "json", (entry / "peaks.json").read_bytes(), entry / "peaks.json", read_trace, (ValueError,)),
        Reader(
            "polygraphy", "json", (folder / "logits.json").read_bytes(), folder / "logits.json",
            lambda: list(read_logits(folder / "logits.json")),
        ),
    ]  # fmt: skip
