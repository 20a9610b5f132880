"""Every target against itself, in the graphs that run on this host, and the ranges of what they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from gptoss_export.engines.build_info import BuildSettings
from gptoss_export.engines.runner import KVCache, Runner, Step, Tokens
from gptoss_export.engines.targets import TARGETS
from gptoss_export.engines.tensorrt.metadata import EngineMetadata, write_metadata
from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.engines.tensorrt.precision import Precision
from gptoss_export.engines.tensorrt.target import write_graph
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.validators.consistency import CHECKS, ConsistencyCheck, measure_consistency
from gptoss_export.validators.ranges import RangeMeter, RangeRecord

TEXTS = [np.random.default_rng(seed).integers(0, 2030, n).tolist() for seed, n in ((0, 600), (1, 41), (2, 1))]

MOST = {"onnx": 5e-5, "ort-cpu": 1e-5, "ort-cpu-int8": 1e-5, "trt-fp32": 5e-5, "trt-fp16": 5e-2, "trt-bf16": 0.5}
"""Of a logit, by another way. Kernels of ours make the same sums for any number of rows; other products do not, and
what is then rounded to 16 bits differs by a unit in the last place."""


@pytest.fixture(scope="module")
def folder_of(
    tiny: Checkpoint, tiny_graph: ir.Model, tiny_builds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """What a target's graph runs from; of an engine without the engine."""

    @cache
    def make(name: str) -> Path:
        if name in tiny_builds:
            return tiny_builds[name]
        folder = tmp_path_factory.mktemp(name)
        (folder / "weights").mkdir()
        for file in tiny.weight_files:
            (folder / "weights" / file.name).write_bytes(file.read_bytes())
        precision, options = Precision(name.removeprefix("trt-")), EngineOptions()
        inputs, _ = write_graph(precision, tiny_graph, tiny, folder, "weights", BuildSettings(options))
        metadata = EngineMetadata(
            flavor="rtx",
            version="1.7.1.116",
            compute_capabilities=("8.0+",),
            dtype=precision.value,
            engine_weights=options.engine_weights,
            max_batch=options.max_batch,
            max_prompt=options.max_prompt,
            max_context=options.max_context,
            max_logits=options.max_logits,
            plugin=options.plugin,
            engine_sha256="0" * 64,
            inputs=inputs,
        )
        write_metadata(metadata, folder)
        return folder

    return make


def open_graph(name: str, folder: Path) -> Runner:
    return (TARGETS[name].stand_in or TARGETS[name].open_runner)(folder, None)


def measure(
    runner: Runner, checkpoint: Checkpoint, *, max_batch: int | None = None, context: int = 512
) -> tuple[ConsistencyCheck, ...]:
    config = checkpoint.config
    assert config.yarn is not None
    return measure_consistency(
        runner,
        TEXTS,
        replace(config, yarn=replace(config.yarn, original_context=context)),
        "quick",
        long=None,
        max_batch=max_batch,
        max_context=4096,
        live=1000,
    )


@pytest.mark.parametrize("name", MOST)
def test_every_target_agrees_with_itself(name: str, folder_of: Callable[[str], Path], tiny: Checkpoint) -> None:
    # Function bodies are slow: the real original context of 512 is for the kernels.
    context = 512 if name.startswith("ort-cpu") else 48
    checks = measure(open_graph(name, folder_of(name)), tiny, context=context)
    near, far = [1, 15, 16, 17], [context - 1, context, context + 1]
    assert [check.length for check in checks if check.name == "decode"] == near + far
    assert {check.name for check in checks} == set(CHECKS)
    for check in checks:
        assert check.logit_diff_max is not None and check.logit_diff_max <= MOST[name], check
        assert check.name != "repeat" or check.bitwise, check


def test_kernels_of_ours_agree_in_every_bit(folder_of: Callable[[str], Path], tiny: Checkpoint) -> None:
    for max_batch in (None, 1):
        checks = measure(open_graph("ort-cpu", folder_of("ort-cpu")), tiny, max_batch=max_batch)
        assert all(check.bitwise for check in checks)


class Faulty:
    """The artifact, asked otherwise than the caller meant."""

    def __init__(self, runner: Runner, fault: str) -> None:
        self._runner, self._fault, self._calls = runner, fault, 0

    @property
    def vocab_size(self) -> int:
        return self._runner.vocab_size

    def forward(
        self, input_ids: Tokens, attention_mask: Tokens | None = None, cache: KVCache | None = None, keep: int = 1
    ) -> Step:
        self._calls += 1
        if self._fault == "padding is seen":
            attention_mask = None
        if self._fault == "a token is lost at the window" and cache is not None and cache.length == 16:
            cache = self._runner.forward(np.repeat(input_ids[:, :1], 16, axis=1)).cache
        step = self._runner.forward(input_ids, attention_mask, cache, keep)
        if self._fault == "never the same":
            step = Step((step.logits.view(np.int32) + np.int32(self._calls)).view(np.float32), step.cache)
        return step


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("padding is seen", {"padded"}),
        # Steps go on behind the wrong cache, so those that follow are wrong as well.
        ("a token is lost at the window", {"decode"}),
        ("never the same", set(CHECKS)),
    ],
)
def test_faults_show(fault: str, found: set[str], folder_of: Callable[[str], Path], tiny: Checkpoint) -> None:
    checks = measure(Faulty(open_graph("ort-cpu", folder_of("ort-cpu")), fault), tiny)
    assert {check.name for check in checks if not check.bitwise} == found
    if fault == "never the same":
        assert all(0 < (check.ulps_max or 0) < 100 for check in checks)
    elif fault == "a token is lost at the window":
        assert [check.length for check in checks if not check.bitwise] == [16, 17]


def ranges(name: str, folder: Path, checkpoint: Checkpoint) -> tuple[RangeRecord, ...]:
    inspector = TARGETS[name].inspect(folder, None)
    meter = RangeMeter({})
    stream = np.random.default_rng(0).standard_normal((7, checkpoint.config.hidden_size)).astype(np.float32)
    for layer in range(inspector.num_layers):
        meter.add(layer, inspector.layer(layer).run(stream, stream, ops=True))
    return meter.records(checkpoint)


@pytest.mark.parametrize("name", MOST)
def test_the_types_that_a_target_holds(name: str, folder_of: Callable[[str], Path], tiny: Checkpoint) -> None:
    found = ranges(name, folder_of(name), tiny)
    narrow = {"trt-fp16": ["float16"], "trt-bf16": ["bfloat16"]}.get(name, [])
    assert [(record.layer, record.type) for record in found] == [
        (layer, held) for layer in range(tiny.config.num_layers) for held in (*narrow, "float32")
    ]
    for record in found:
        assert (record.saturated, record.activation_op != "") == (0, True)
        assert record.weight_name.startswith(f"model.layers.{record.layer}.")
        assert record.headroom_bits is not None
        assert 8 < record.headroom_bits < 16 if record.type == "float16" else record.headroom_bits > 100


def test_a_layer_that_overflows_float16(folder_of: Callable[[str], Path], tiny: Checkpoint, tmp_path: Path) -> None:
    """A norm's weight is float32 everywhere; what it makes is not."""
    source = folder_of("trt-fp16")
    for path in (path for path in source.rglob("*") if path.is_file()):
        target = tmp_path / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    ref = tiny.tensors["model.layers.2.input_layernorm.weight"]
    with (tmp_path / "weights" / ref.file.name).open("r+b") as file:
        file.seek(ref.offset)
        file.write(b"\x00\x48" * (ref.nbytes // 2))  # 131072 in bfloat16
    found = ranges("trt-fp16", tmp_path, tiny)
    (half,) = (record for record in found if (record.layer, record.type) == (2, "float16"))
    assert half.saturated > 100
    assert half.headroom_bits is not None and half.headroom_bits < 1
    assert {record.layer for record in found if record.saturated} == {2}
