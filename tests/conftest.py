"""What all tests share: the small trained checkpoint, and the same network in every layout."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import numpy as np
import onnx_ir as ir
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from gptoss_export.engines.build_info import BuildSettings
from gptoss_export.engines.memory import machine_memory
from gptoss_export.engines.targets import TARGETS
from gptoss_export.exporter.checkpoint.config import ModelConfig
from gptoss_export.exporter.checkpoint.layouts import StoredTensor, stored_tensors
from gptoss_export.exporter.checkpoint.mxfp4 import decode_bf16
from gptoss_export.exporter.checkpoint.open import open_checkpoint, read_tensor
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, Layout
from gptoss_export.exporter.graph import build as graph_build
from gptoss_export.exporter.graph.build import build_graph
from gptoss_export.exporter.weights import hash_files
from gptoss_export.validators.evidence import Evidence
from gptoss_export.validators.gates import Gates
from gptoss_export.validators.positions import Texts
from gptoss_export.validators.reference import Reference
from gptoss_export.validators.scenario_run import ScenarioRun
from gptoss_export.validators.scenarios import SCENARIOS
from gptoss_export.validators.verdict import Case, cases

if TYPE_CHECKING:
    import torch
    from transformers import GptOssForCausalLM

    from gptoss_export.exporter.planning.request import Effort
    from gptoss_export.validators.floor import FloorDtype, FloorRecord

# How fast examples are drawn says something about the machine, nothing about the code.
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")


MOST_WORKERS = 4
WORKER_BYTES = 3 << 30
"""What a worker and the exports that it starts have taken, and then some."""


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a worker a core, as far as memory goes; more than a few only make the same fixtures again."""
    return max(1, min(cores(), MOST_WORKERS, (machine_memory() or WORKER_BYTES) // WORKER_BYTES))


def pytest_configure(config: pytest.Config) -> None:
    """Workers inherit their share of the cores; twice as many threads as cores take more than twice as long."""
    if workers := config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // workers)))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of the tests, the same one for all of its workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def once(shared: Path) -> Callable[[str, Callable[[Path], object]], Path]:
    """A folder by its name, filled by whoever wants it first. It is read, never changed: others have it too."""

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, begun = shared / name, shared / f"{name}.partial"
        with FileLock(shared / f"{name}.lock"):
            if not folder.exists():
                shutil.rmtree(begun, ignore_errors=True)
                begun.mkdir()
                fill(begun)
                begun.rename(folder)
        return folder

    return make


@pytest.fixture(scope="session", autouse=True)
def cache(shared: Path) -> Iterator[None]:
    """Runs of the reference are shared by the tests of a run, and by nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTOSS_EXPORT_CACHE", str(shared / "cache"))
        yield


@pytest.fixture(scope="session")
def failing_texts() -> Callable[[ScenarioRun, Reference, Gates, float | None], list[Case]]:
    """The gates of scenarios and of all texts that a run did not keep, where every router has so much noise: with 0
    every position is settled and has the narrow gates, with None none is."""

    def failing(found: ScenarioRun, reference: Reference, gates: Gates, noise: float | None) -> list[Case]:
        layers = reference.config.num_layers
        texts = Texts(reference, [noise] * layers)
        evidence = Evidence(layers, found.results(texts), found.pooled(texts), None, (), None, (), (), "")
        places = {"texts", *SCENARIOS, *(f"settled positions of {name}" for name in SCENARIOS)}
        return [case for case in cases(evidence, gates) if case.where in places and not case.kept]

    return failing


@pytest.fixture(scope="session")
def read_document() -> Callable[[str, str], dict[str, Any]]:
    """Reads what a command printed on stdout: one document, as its schema has it, which is named first."""
    docs = Path(__file__).parents[1] / "docs"

    def read(name: str, stdout: str) -> dict[str, Any]:
        path = docs / "bench.schema.json" if name == "bench" else docs / "schemas" / f"{name}.schema.json"
        schema = json.loads(path.read_text())
        jsonschema.Draft202012Validator.check_schema(schema)
        found = json.loads(stdout)
        jsonschema.Draft202012Validator(schema).validate(found)
        assert isinstance(found, dict) and "outcome" not in stdout
        return found

    return read


@pytest.fixture(scope="session")
def tiny_dir() -> Path:
    """A trained gpt-oss of 4 layers and 16 experts in the released format."""
    return Path(__file__).parent / "data" / "tiny-gpt-oss"


@pytest.fixture(scope="session")
def load_plain(tiny_dir: Path) -> Callable[[torch.dtype], GptOssForCausalLM]:
    """Loads the small checkpoint as transformers loads it, whole, in that dtype; each call gives another model."""
    from transformers import GptOssForCausalLM, Mxfp4Config

    def load(dtype: torch.dtype) -> GptOssForCausalLM:
        return GptOssForCausalLM.from_pretrained(
            tiny_dir,
            dtype=dtype,
            quantization_config=Mxfp4Config(dequantize=True),
            attn_implementation="eager",
            experts_implementation="eager",
        ).eval()

    return load


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path) -> Checkpoint:
    """The small checkpoint, opened."""
    return open_checkpoint(tiny_dir)


@pytest.fixture(scope="session")
def tiny_graph(tiny: Checkpoint) -> ir.Model:
    """The canonical graph of the small checkpoint; builds clone it, nobody changes it."""
    return build_graph(tiny.config, tiny.layout)


@pytest.fixture(scope="module")
def known_graph(tiny: Checkpoint, tiny_graph: ir.Model) -> Iterator[None]:
    """Spares the commands of a module the tracing of the small checkpoint: what they build from is the same graph."""
    trace = graph_build.build_graph

    def known(config: ModelConfig, layout: Layout) -> ir.Model:
        return tiny_graph.clone() if (config, layout) == (tiny.config, tiny.layout) else trace(config, layout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_build, "build_graph", known)
        yield


@pytest.fixture(scope="session")
def tiny_builds(
    tiny: Checkpoint, tiny_graph: ir.Model, once: Callable[[str, Callable[[Path], object]], Path]
) -> dict[str, Path]:
    """For each target of ONNX Runtime, a folder with model.onnx and its weights."""

    def build(target: str, folder: Path) -> None:
        weights = folder / "weights"
        weights.mkdir()
        for file in tiny.weight_files:
            (weights / file.name).write_bytes(file.read_bytes())
        TARGETS[target].build(tiny_graph, tiny, folder, "weights", BuildSettings())

    return {name: once(name, partial(build, name)) for name in TARGETS if not name.startswith("trt-")}


@pytest.fixture(scope="session")
def tiny_files(tiny: Checkpoint) -> dict[str, str]:
    """sha256 of the small checkpoint's files, by which the cache knows runs of its reference."""
    paths = {path.name: path for path in (tiny.root / "config.json", *tiny.weight_files, *tiny.side_files)}
    return {name: record.sha256 for name, record in hash_files(paths).items()}


@pytest.fixture(scope="session")
def run_of(tiny: Checkpoint, tiny_files: dict[str, str]) -> Callable[[Effort], Reference]:
    """The reference in the probes of an effort: one run for all tests that are about something else."""
    from gptoss_export.validators.probes import default_probes
    from gptoss_export.validators.reference_cache import default_cache, reference_for

    return lambda effort: reference_for(
        tiny, tiny_files, default_probes(tiny, effort), "float32", cache=default_cache()
    )


@pytest.fixture(scope="session")
def floor_of(
    tiny: Checkpoint, tiny_files: dict[str, str], run_of: Callable[[Effort], Reference]
) -> Callable[[FloorDtype], FloorRecord]:
    """The noise floor of a type in the quick probes, likewise."""
    from gptoss_export.validators.floor import measure_floor
    from gptoss_export.validators.reference_cache import default_cache

    return lambda dtype: measure_floor(tiny, run_of("quick"), dtype, files=tiny_files, cache=default_cache())


@pytest.fixture(scope="session")
def tiny_reference(load_plain: Callable[[torch.dtype], GptOssForCausalLM]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [1, 100] and transformers' logits [1, 100, V] for them: the released loading path, in float32."""
    import torch

    ids = np.random.default_rng(0).integers(0, 2030, (1, 100))
    model = load_plain(torch.float32)
    with torch.no_grad():
        return ids, model(torch.from_numpy(ids)).logits.numpy()


@pytest.fixture(scope="session")
def tiny_layouts(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    """The small checkpoint in all three layouts: the same network, since MXFP4 values are exact in bf16."""
    from safetensors.numpy import save_file

    source = open_checkpoint(tiny_dir)
    folders = {Layout.HF_MXFP4: tiny_dir}
    for layout in (Layout.HF_BF16, Layout.ORIGINAL):
        folder = folders[layout] = tmp_path_factory.mktemp(layout.value)
        tensors = {t.name: _stored(source, t) for t in stored_tensors(source.config, layout)}
        save_file(tensors, folder / "model.safetensors")
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            (folder / name).write_bytes((tiny_dir / name).read_bytes())
        config = {k: v for k, v in source.raw_config.items() if k != "quantization_config"}
        if layout is Layout.ORIGINAL:
            config = _original_config(source.config)
        (folder / "config.json").write_text(json.dumps(config))
    return folders


def _stored(source: Checkpoint, tensor: StoredTensor) -> np.ndarray:
    parts = []
    for part in tensor.parts:
        if part.name in source.tensors:
            parts.append(read_tensor(source.tensors[part.name]))
        else:
            blocks, scales = (source.tensors[f"{part.name}_{kind}"] for kind in ("blocks", "scales"))
            parts.append(decode_bf16(read_tensor(blocks), read_tensor(scales)).transpose(0, 2, 1))
    return np.ascontiguousarray(np.concatenate(parts))


def _original_config(config: ModelConfig) -> dict[str, object]:
    assert config.yarn is not None
    return {
        "num_hidden_layers": config.num_layers,
        "num_experts": config.num_experts,
        "experts_per_token": config.top_k,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "swiglu_limit": config.swiglu_limit,
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "sliding_window": config.sliding_window,
        "initial_context_length": config.yarn.original_context,
        "rope_theta": config.rope_theta,
        "rope_scaling_factor": config.yarn.factor,
        "rope_ntk_alpha": config.yarn.beta_slow,
        "rope_ntk_beta": config.yarn.beta_fast,
    }
