"""The experts as a plugin: in networks that TensorRT builds, and called as TensorRT would call it on a GPU."""

import dataclasses
import sys
import textwrap
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gptoss_export.engines.tensorrt import build as builds
from gptoss_export.engines.tensorrt import plugin as plugins
from gptoss_export.engines.tensorrt.build import BuildResult, build_engine
from gptoss_export.engines.tensorrt.kernels.bundle import MAGIC, KernelBundle
from gptoss_export.engines.tensorrt.kernels.launch import MoEShape, workspace_bytes
from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.exporter.errors import EngineBuildError, EngineMismatchError, IntegrityError

trt = pytest.importorskip("tensorrt_rtx")

SHAPE = MoEShape(experts=4, hidden=64, intermediate=32, top_k=2, dtype="fp16", swiglu_alpha=1.702, swiglu_limit=7.0)
MARK = b"KERNELS-OF-A-TEST"
WEIGHTS = ("gate_up_blocks", "gate_up_scales", "gate_up_bias", "down_blocks", "down_scales", "down_bias")
LAYERS = 2
TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "fp32": TensorProto.FLOAT}

# Stands for kernels/aot.py, so that these tests need no compiler: a bundle whose machine code is MARK.
COMPILER = f"""
from gptoss_export.engines.tensorrt.kernels.bundle import CompiledKernel, KernelBundle, parameter_kinds
from gptoss_export.engines.tensorrt.kernels.bundle import MAGIC, KernelBundle
from gptoss_export.engines.tensorrt.kernels.launch import kernel_specs

def compile_bundle(shape, archs=(80, 90)):
    def kernel(spec):
        return CompiledKernel(spec.function, spec.warps, 0, parameter_kinds(spec), b"\\x7fELF" + {MARK!r})
    kernels = {{name: dict.fromkeys(archs, kernel(spec)) for name, spec in kernel_specs(shape).items()}}
    return KernelBundle(shape, "3.9.0", archs, kernels)
"""
CHILD = f"""
import sys
from gptoss_export.engines.tensorrt import build_child
from gptoss_export.engines.tensorrt.kernels import aot
exec({COMPILER!r}, compiler := {{}})
aot.compile_bundle = compiler["compile_bundle"]
"""


def fake_bundle() -> bytes:
    exec(COMPILER, compiler := {})
    return compiler["compile_bundle"](SHAPE).to_bytes()


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The building process with these kernels; more source can be put in before it begins."""

    def start(more: str = "") -> None:
        (tmp_path / "child_with_kernels.py").write_text(
            CHILD + textwrap.dedent(more) + "\nsys.exit(build_child.main())\n"
        )

    start()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(builds, "CHILD", "child_with_kernels")
    return start


def weight_inputs(layer: int, shape: MoEShape) -> dict[str, tuple[int, tuple[int, ...]]]:
    E, H, I = shape.experts, shape.hidden, shape.intermediate  # noqa: E741
    shapes = ((E, 2 * I, H // 32, 16), (E, 2 * I, H // 32), (E, 2 * I), (E, H, I // 32, 16), (E, H, I // 32), (E, H))
    kinds = (TensorProto.INT8, TensorProto.INT8, TensorProto.BFLOAT16) * 2
    return {f"l{layer}.{name}": pair for name, *pair in zip(WEIGHTS, kinds, shapes, strict=True)}


def experts_graph(
    path: Path, shape: MoEShape = SHAPE, *, attributes: bool = True, function: bool = True, inputs: bool = True
) -> Path:
    """Tokens, a router and LAYERS layers of experts, whose weights are inputs or constants of the network."""
    K, kind = shape.top_k, TYPES[shape.dtype]
    info, node = helper.make_tensor_value_info, helper.make_node
    named = {"plugin_namespace": "com.gptoss", "plugin_version": "1"} if attributes else {}
    swiglu = {"swiglu_alpha": shape.swiglu_alpha, "swiglu_limit": shape.swiglu_limit}
    table = np.ones((16, shape.hidden), np.float32)
    constants = [numpy_helper.from_array(np.array([K]), "k"), numpy_helper.from_array(table, "table")]
    constants += [numpy_helper.from_array(np.array([-1, shape.hidden]), "rows")]
    constants += [numpy_helper.from_array(np.ones((shape.hidden, shape.experts), np.float32), "router")]
    nodes = [node("Gather", ["table", "input_ids"], ["embedded"]), node("Reshape", ["embedded", "rows"], ["x0"])]
    weights = []
    for layer in range(LAYERS):
        x, y, n = f"x{layer}", f"x{layer + 1}", layer
        names = weight_inputs(layer, shape)
        for name, (weight_kind, sizes) in names.items():
            if inputs:
                weights.append(info(name, weight_kind, sizes))
            else:
                count = int(np.prod(sizes)) * (2 if weight_kind == TensorProto.BFLOAT16 else 1)
                constants.append(helper.make_tensor(name, weight_kind, sizes, bytes(count), raw=True))
        nodes += [
            node("MatMul", [x, "router"], [f"scores{n}"]),
            node("TopK", [f"scores{n}", "k"], [f"top{n}", f"places{n}"]),
            node("Softmax", [f"top{n}"], [f"w{n}"]),
            node("Cast", [f"places{n}"], [f"e{n}"], to=TensorProto.INT32),
            node("Cast", [x], [f"h{n}"], to=kind),
            node("MoEExpertsMXFP4", [f"h{n}", f"w{n}", f"e{n}", *names], [f"y{n}"], f"moe{n}", "", "com.gptoss",
                 **swiglu, **named),
            node("Add", [x, f"y{n}"], [y]),
        ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "experts",
        [info("input_ids", TensorProto.INT64, ["B", "S"]), *weights],
        [info(f"x{LAYERS}", TensorProto.FLOAT, ["T", shape.hidden])],
        constants,
    )
    body = onnx.parser.parse_function(
        '<domain: "com.gptoss", opset_import: ["" : 21]> MoEExpertsMXFP4 '
        "<swiglu_alpha, swiglu_limit, plugin_namespace, plugin_version> "
        "(x, weights, experts, a, b, c, d, e, f) => (y) { z = Cast <to = 1> (x) y = Add(z, z) }"
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.gptoss", 1)],
        ir_version=10,
        functions=[body] if function else [],
    )
    onnx.save(model, path)
    return path


def run(folder: Path, kernels: MoEShape | None = SHAPE, **graph: object) -> BuildResult:
    path = experts_graph(folder / "model.onnx", **graph)
    return build_engine(path, folder / "engine.plan", EngineOptions(max_batch=2, max_prompt=16), plugin_shape=kernels)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_experts_become_plugins_that_carry_their_kernels(tmp_path: Path, child, dtype: str) -> None:
    shape = dataclasses.replace(SHAPE, dtype=dtype)
    result = run(tmp_path, shape, shape=shape)
    assert result.plugin_layers == LAYERS
    assert list(result.seconds) == ["kernels", "parse", "build", "write"]
    assert result.kernel_bytes > len(MARK)
    engine = (tmp_path / "engine.plan").read_bytes()
    assert engine.count(MAGIC) >= LAYERS
    stored = KernelBundle.from_bytes(engine[(start := engine.index(MAGIC)) : start + result.kernel_bytes])
    assert stored.shape == shape
    assert all(MARK in kernel.cubin for kernels in stored.kernels.values() for kernel in kernels.values())


def test_kernels_are_for_the_chosen_gpus(tmp_path: Path, child) -> None:
    path, engine = experts_graph(tmp_path / "model.onnx"), tmp_path / "engine.plan"
    sizes = {}
    for capabilities in ((), ("8.6",), ("8.0", "8.6"), ("8.6", "12.0")):
        options = EngineOptions(max_prompt=16, compute_capabilities=capabilities)
        sizes[capabilities] = build_engine(path, engine, options, plugin_shape=SHAPE).kernel_bytes
    assert sizes["8.6",] == sizes["8.0", "8.6"] < sizes["8.6", "12.0"] < sizes[()]
    options = EngineOptions(max_prompt=16, compute_capabilities=("7.5",))
    with pytest.raises(EngineBuildError, match=r"no kernels for GPUs of compute capability 7\.5"):
        build_engine(path, tmp_path / "other.plan", options, plugin_shape=SHAPE)


def test_with_real_kernels(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    path, engine = experts_graph(tmp_path / "model.onnx"), tmp_path / "engine.plan"
    options = EngineOptions(max_prompt=16, compute_capabilities=("8.6",))
    result = build_engine(path, engine, options, plugin_shape=SHAPE)
    data = engine.read_bytes()
    stored = KernelBundle.from_bytes(data[(start := data.index(MAGIC)) : start + result.kernel_bytes])
    assert (stored.shape, stored.archs) == (SHAPE, (80,))


def test_weights_may_be_constants(tmp_path: Path, child) -> None:
    assert run(tmp_path, inputs=False).plugin_layers == LAYERS


def test_no_function_body_is_needed(tmp_path: Path, child) -> None:
    assert run(tmp_path, function=False).plugin_layers == LAYERS


def test_workspace_is_for_the_most_tokens_of_each_profile(tmp_path: Path, child) -> None:
    child("""
        from gptoss_export.engines.tensorrt.kernels import launch
        def workspace(shape, tokens): print("tokens", tokens, file=sys.stderr); return 256
        launch.workspace_bytes = workspace
    """)
    assert {line for line in run(tmp_path).log if line.startswith("tokens")} == {"tokens 2", "tokens 32"}


def test_without_plugin_the_function_body_is_built(tmp_path: Path) -> None:
    path = experts_graph(tmp_path / "model.onnx")
    result = build_engine(path, tmp_path / "engine.plan", EngineOptions(plugin=False))
    assert result.plugin_layers == result.kernel_bytes == 0
    assert MAGIC not in (tmp_path / "engine.plan").read_bytes()


@pytest.mark.parametrize(
    ("shape", "graph", "says"),
    [
        (SHAPE, {"attributes": False}, "has 0 plugin layers where 2 are expected"),
        (None, {}, "nothing says for what shape"),
        (dataclasses.replace(SHAPE, dtype="bf16"), {}, "x is HALF [-1, 64], the kernels are for BF16 [-1, 64]"),
        (dataclasses.replace(SHAPE, experts=8), {}, "gate_up_blocks is INT8 [4, 64, 2, 16]"),
        (dataclasses.replace(SHAPE, top_k=3), {}, "weights is FLOAT [-1, 2], the kernels are for FLOAT [-1, 3]"),
        (dataclasses.replace(SHAPE, swiglu_alpha=1.5), {}, "moe0 has swiglu_alpha 1.70"),
        (dataclasses.replace(SHAPE, swiglu_limit=6.0), {}, "moe0 has swiglu_limit 7.0"),
    ],
)
def test_never_silently_something_else(tmp_path: Path, child, shape: MoEShape | None, graph: dict, says: str) -> None:
    with pytest.raises(EngineBuildError) as caught:
        run(tmp_path, shape, **graph)
    assert says in caught.value.what
    assert not (tmp_path / "engine.plan").exists()


def test_without_plugin_and_without_function_nothing_is_built(tmp_path: Path) -> None:
    path = experts_graph(tmp_path / "model.onnx", function=False)
    with pytest.raises(EngineBuildError, match=r"refuses MoEExpertsMXFP4 \(moe0\)"):
        build_engine(path, tmp_path / "engine.plan", EngineOptions(plugin=False))


@pytest.mark.parametrize(
    "callback",
    [
        "clone", "configure_plugin", "get_fields_to_serialize", "get_output_data_types", "get_output_shapes",
        "get_workspace_size", "supports_format_combination",
    ],
)  # fmt: skip
def test_a_callback_that_raises_fails_the_build(tmp_path: Path, child, callback: str) -> None:
    """TensorRT 1.7.1 itself goes on after an exception in some of them."""
    child(f"""
        from gptoss_export.engines.tensorrt import plugin
        def {callback}(self, *args): raise RuntimeError("this went wrong")
        plugin.MoEPlugin.{callback} = plugin._reported({callback})
    """)
    with pytest.raises(EngineBuildError, match=f"MoEExpertsMXFP4.{callback}: RuntimeError: this went wrong"):
        run(tmp_path)
    assert not (tmp_path / "engine.plan").exists()


class _Launcher:
    """Stands for kernels/driver.py, which needs a GPU."""

    made: list["_Launcher"]

    def __init__(self, bundle: object) -> None:
        self.bundle, self.launches = bundle, []
        self.made.append(self)

    def launch(self, tokens: int, **arguments: int) -> None:
        self.launches.append((tokens, arguments))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> type[_Launcher]:
    """Module driver of these tests, in this process."""
    driver = types.ModuleType("gptoss_export.engines.tensorrt.kernels.driver")
    _Launcher.made = []
    driver.MoELauncher = _Launcher
    monkeypatch.setitem(sys.modules, driver.__name__, driver)
    return _Launcher


@pytest.fixture
def bundle(kernels: type[_Launcher]) -> bytes:
    return fake_bundle()


def create(shared: plugins.Kernels, bundle: bytes | None, phase: object, **fields: np.ndarray) -> plugins.MoEPlugin:
    """What TensorRT does when it parses a node or loads an engine."""
    values = {"swiglu_alpha": np.float32([1.702]), "swiglu_limit": np.float32([7.0])} | fields
    creator = trt.get_plugin_registry().get_creator("MoEExpertsMXFP4", "1", "com.gptoss")
    assert creator is not None
    collection = trt.PluginFieldCollection(
        [trt.PluginField(name, value, field_type(value)) for name, value in values.items()]
    )
    return creator.create_plugin("moe", collection, phase)


def field_type(value: np.ndarray) -> object:
    return trt.PluginFieldType.INT8 if value.dtype == np.int8 else trt.PluginFieldType.FLOAT32


def quiet() -> SimpleNamespace:
    lines: list[str] = []
    return SimpleNamespace(log=lambda level, line: lines.append(line), lines=lines)


def test_what_is_serialised_makes_the_same_plugin(bundle: bytes) -> None:
    shared = plugins.register(trt, bundle, quiet())
    built = create(shared, bundle, trt.TensorRTPhase.BUILD)
    stored = {field.name: np.array(field.data) for field in built.get_fields_to_serialize()}
    assert stored.keys() == {"swiglu_alpha", "swiglu_limit", "kernels"}
    loading = plugins.register(trt, None, quiet())
    loaded = create(loading, None, trt.TensorRTPhase.RUNTIME, **stored)
    assert (loaded.bundle, loaded.shape) == (bundle, SHAPE)
    assert create(loading, None, trt.TensorRTPhase.RUNTIME, **stored).bundle is loaded.bundle
    assert loaded.kernels is loading
    assert not shared.failures + loading.failures


def test_layers_and_contexts_share_one_launcher(bundle: bytes, kernels: type[_Launcher]) -> None:
    shared = plugins.register(trt, bundle, quiet())
    first, second = (create(shared, bundle, trt.TensorRTPhase.BUILD) for _ in range(2))
    assert kernels.made == []
    attached = [plugin.attach_to_context(None) for plugin in (first, second, first)]
    assert len(kernels.made) == 1
    assert len(set(map(id, attached))) == 3
    assert attached[0].clone()._launcher is kernels.made[0]


def descriptions(tokens: int) -> list[SimpleNamespace]:
    E, H, I, K = SHAPE.experts, SHAPE.hidden, SHAPE.intermediate, SHAPE.top_k  # noqa: E741
    sizes = [(tokens, H), (tokens, K), (tokens, K), (E, 2 * I, H // 32, 16), (E, 2 * I, H // 32), (E, 2 * I),
             (E, H, I // 32, 16), (E, H, I // 32), (E, H)]  # fmt: skip
    names = ("HALF", "FLOAT", "INT32", "INT8", "INT8", "BF16", "INT8", "INT8", "BF16")
    kinds = [getattr(trt.DataType, name) for name in names]
    return [SimpleNamespace(dims=dims, type=kind) for dims, kind in zip(sizes, kinds, strict=True)]


def test_enqueue_hands_over_pointers(bundle: bytes, kernels: type[_Launcher]) -> None:
    shared = plugins.register(trt, bundle, quiet())
    plugin = create(shared, bundle, trt.TensorRTPhase.BUILD).attach_to_context(None)
    plugin.on_shape_change(descriptions(5), [SimpleNamespace(dims=(5, 64), type=trt.DataType.FLOAT)])
    pointers = list(range(1000, 10000, 1000))
    assert plugin.enqueue(descriptions(5), [], pointers, [50000], 60000, 7) == 0
    ((tokens, arguments),) = kernels.made[0].launches
    assert tokens == 5
    assert arguments == dict(zip(("x", "weights", "experts", *WEIGHTS), pointers, strict=True)) | {
        "y": 50000, "workspace": 60000, "stream": 7,
    }  # fmt: skip


def test_no_tokens_no_launch(bundle: bytes, kernels: type[_Launcher]) -> None:
    shared = plugins.register(trt, bundle, quiet())
    plugin = create(shared, bundle, trt.TensorRTPhase.BUILD).attach_to_context(None)
    assert plugin.enqueue(descriptions(0), [], [0] * 9, [0], 0, 0) == 0
    assert kernels.made[0].launches == []


def test_failures_are_logged_kept_and_raised(bundle: bytes) -> None:
    logger = quiet()
    shared = plugins.register(trt, bundle, logger)
    plugin = create(shared, bundle, trt.TensorRTPhase.BUILD)
    with pytest.raises(RuntimeError, match="never attached"):
        plugin.enqueue(descriptions(5), [], [0] * 9, [0], 0, 0)
    wrong = descriptions(5)
    wrong[3].dims = (5, 64, 2, 16)
    with pytest.raises(ValueError, match="gate_up_blocks is INT8"):
        plugin.on_shape_change(wrong, [])
    assert len(logger.lines) == len(shared.failures) == 2
    with pytest.raises(EngineBuildError, match="never attached"):
        shared.require_no_failures()


def test_an_error_with_a_next_step_stays_what_it_is(bundle: bytes, kernels: type[_Launcher], monkeypatch) -> None:
    def refuse(self: _Launcher, bundle: object) -> None:
        raise EngineMismatchError("no kernels for compute capability 7.0", "use another GPU")

    monkeypatch.setattr(kernels, "__init__", refuse)
    shared = plugins.register(trt, bundle, quiet())
    with pytest.raises(EngineMismatchError):
        create(shared, bundle, trt.TensorRTPhase.BUILD).attach_to_context(None)
    with pytest.raises(EngineMismatchError, match="no kernels for compute capability"):
        shared.require_no_failures()


def test_workspace_size_is_the_kernels_own(bundle: bytes) -> None:
    plugin = create(plugins.register(trt, bundle, quiet()), bundle, trt.TensorRTPhase.BUILD)
    for tokens in (1, 16, 512):
        assert plugin.get_workspace_size([SimpleNamespace(max=(tokens, 64))], []) == workspace_bytes(SHAPE, tokens)


def test_foreign_kernels_are_refused(bundle: bytes) -> None:
    shared = plugins.register(trt, None, quiet())
    with pytest.raises(IntegrityError, match="the compiled kernels"):
        create(shared, None, trt.TensorRTPhase.RUNTIME, kernels=np.frombuffer(b"something else", np.int8))
    with pytest.raises(ValueError, match="no kernels were compiled"):
        create(shared, None, trt.TensorRTPhase.BUILD)
    assert len(shared.failures) == 2


def test_registering_again_replaces(bundle: bytes) -> None:
    first, second = plugins.register(trt, bundle, quiet()), plugins.register(trt, bundle, quiet())
    assert first is not second
    assert create(second, bundle, trt.TensorRTPhase.BUILD).kernels is second
