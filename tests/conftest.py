"""What all tests share: the small trained checkpoint, and the same network in every layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, settings

from gptoss_export.engines.build_info import BuildSettings
from gptoss_export.engines.targets import TARGETS
from gptoss_export.exporter.checkpoint.config import ModelConfig
from gptoss_export.exporter.checkpoint.layouts import StoredTensor, stored_tensors
from gptoss_export.exporter.checkpoint.mxfp4 import decode_bf16
from gptoss_export.exporter.checkpoint.open import open_checkpoint, read_tensor
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, Layout
from gptoss_export.exporter.graph.build import build_graph
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

# How fast examples are drawn says something about the machine, nothing about the code.
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs of the reference are shared by the tests of a run, and by nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTOSS_EXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
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


@pytest.fixture(scope="session")
def tiny_builds(tiny: Checkpoint, tiny_graph: ir.Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each target of ONNX Runtime, a folder with model.onnx and its weights."""
    folders = {}
    for name, target in TARGETS.items():
        if name.startswith("trt-"):
            continue
        folders[name] = tmp_path_factory.mktemp(name)
        weights = folders[name] / "weights"
        weights.mkdir()
        for file in tiny.weight_files:
            (weights / file.name).write_bytes(file.read_bytes())
        target.build(tiny_graph, tiny, folders[name], "weights", BuildSettings())
    return folders


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
