"""Engines are built in another process, whose every end is a result or one clear error, and never half a file."""

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from gptoss_export.engines.tensorrt import build as builds
from gptoss_export.engines.tensorrt.build import BuildResult, build_engine
from gptoss_export.engines.tensorrt.flavor import gpu_problem
from gptoss_export.engines.tensorrt.header import read_header
from gptoss_export.engines.tensorrt.network import PROFILES, add_profiles
from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.exporter.errors import DiskSpaceError, EngineBuildError, OutOfMemoryError, TargetUnavailableError
from gptoss_export.exporter.progress import SilentProgress

pytest.importorskip("tensorrt_rtx")

STATIC = "g (float16[2,4] x) => (float16[2,4] y) { y = Add(x, x) }"
PAST = "past_key_values.0.key"
DYNAMIC = """g (int64[B,S] input_ids, int64[B,C] key_positions, float16[B,2,C,8] past)
    => (int64[B,S] ids, int64[B,C] positions, float16[B,2,C,8] keys) {
    ids = Add(input_ids, input_ids)
    positions = Add(key_positions, key_positions)
    keys = Add(past, past)
}"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where graphs and engines lie; temporary files go elsewhere, and none may be left there."""
    temporary, work = tmp_path / "temporary", tmp_path / "work"
    temporary.mkdir()
    work.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield work
    assert list(temporary.iterdir()) == []


def graph(folder: Path, text: str, opset: int = 21) -> Path:
    path = folder / "model.onnx"
    model = onnx.parser.parse_model(f'<ir_version: 12, opset_import: ["" : {opset}]> {text}')
    for value in model.graph.input:
        value.name = PAST if value.name == "past" else value.name  # the syntax has no dots in names
    for node in model.graph.node:
        node.input[:] = [PAST if name == "past" else name for name in node.input]
    onnx.save(model, path)
    return path


def refusal(folder: Path, onnx_path: Path, options: EngineOptions | None = None) -> EngineBuildError:
    """The error of a build, which leaves nothing behind."""
    with pytest.raises(EngineBuildError) as caught:
        build_engine(onnx_path, folder / "engine.plan", options or EngineOptions())
    assert [path.name for path in folder.iterdir()] == [onnx_path.name]
    assert "\n" not in caught.value.what
    return caught.value


@pytest.fixture
def child_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Replaces the building process by another module, given as source text."""

    def replace(source: str) -> None:
        (tmp_path / "some_child.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(builds, "CHILD", "some_child")

    return replace


class _Recorder(SilentProgress):
    """Remembers the tasks and what they advanced by."""

    def __init__(self) -> None:
        self.tasks: dict[str, int] = {}

    @contextmanager
    def task(self, label: str, total: int | None = None, unit: str = "steps") -> Iterator["_Recorder"]:
        self.tasks[label] = 0
        yield self

    def advance(self, amount: int) -> None:
        self.tasks[list(self.tasks)[-1]] += amount


def test_an_engine_is_built(folder: Path) -> None:
    progress, engine = _Recorder(), folder / "engine.plan"
    result = build_engine(graph(folder, STATIC), engine, EngineOptions(), progress=progress)
    assert isinstance(result, BuildResult)
    assert result.flavor == "rtx"
    assert list(result.seconds) == ["parse", "build", "write"]
    assert result.nbytes == engine.stat().st_size
    assert result.sha256 == hashlib.sha256(engine.read_bytes()).hexdigest()
    assert (result.layers, result.plugin_layers) == (1, 0)
    assert 50e6 < result.peak_rss < 2e9
    assert progress.tasks == {"engine: parse": 0, "engine: build": 0, "engine: write": result.nbytes}
    header = read_header(engine)
    assert ".".join(map(str, header.version)) == result.version
    assert header.compute_capabilities == ("8.0+",)
    assert sorted(path.name for path in folder.iterdir()) == ["engine.plan", "model.onnx"]


def test_compute_capabilities(folder: Path) -> None:
    path, engine = graph(folder, STATIC), folder / "engine.plan"
    build_engine(path, engine, EngineOptions(compute_capabilities=("8.6", "12.0")))
    assert read_header(engine).compute_capabilities == ("8.6", "12.0")
    engine.unlink()
    error = refusal(folder, path, EngineOptions(compute_capabilities=("9.0",)))
    assert "no GPU of compute capability 9.0" in error.what
    assert "8.9" in error.next_step


def test_external_weights_are_read_from_beside_the_graph(folder: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[2,4] x) => (float[2,3] y) { y = MatMul(x, w) }'
    )
    weight = onnx.numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(4, 3), "w")
    model.graph.initializer.append(weight)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    result = build_engine(folder / "model.onnx", folder / "engine.plan", EngineOptions())
    assert result.nbytes > 0
    (folder / "weights.bin").unlink()
    (folder / "engine.plan").unlink()
    assert "refuses" in refusal(folder, folder / "model.onnx").what


def test_attention_without_a_kernel_of_its_own_is_built_of_smaller_operators(folder: Path) -> None:
    """No attention kernel of TensorRT takes float32."""
    tensors = ", ".join(f"float[1,2,{size},16] {name}" for name, size in (("q", 3), ("k", 5), ("v", 5)))
    text = (
        f"g ({tensors}, float[1,1,3,5] mask) => (float[1,2,3,16] y) {{ y = Attention <scale = 0.25> (q, k, v, mask) }}"
    )
    assert build_engine(graph(folder, text, opset=24), folder / "engine.plan", EngineOptions()).nbytes


def test_a_dynamic_input_that_is_none_of_ours(folder: Path) -> None:
    error = refusal(folder, graph(folder, "g (float16[B,4] x) => (float16[B,4] y) { y = Add(x, x) }"))
    assert "input x has the shape [-1, 4], for which there is no profile" in error.what


class _Profiles:
    """A builder, a config and a network that only know shapes."""

    def __init__(self, inputs: dict[str, tuple[int, ...]]) -> None:
        self.added: list[dict[str, tuple[tuple[int, ...], ...]]] = []
        self._inputs = [SimpleNamespace(name=name, shape=shape) for name, shape in inputs.items()]
        self.num_inputs = len(inputs)

    def get_input(self, index: int) -> SimpleNamespace:
        return self._inputs[index]

    def create_optimization_profile(self) -> SimpleNamespace:
        shapes: dict[str, tuple[tuple[int, ...], ...]] = {}
        return SimpleNamespace(shapes=shapes, set_shape=lambda name, *sizes: shapes.update({name: sizes}))

    def add_optimization_profile(self, profile: SimpleNamespace) -> int:
        self.added.append(profile.shapes)
        return len(self.added) - 1


def test_the_profiles_are_those_of_the_contract() -> None:
    network = _Profiles(
        {
            "input_ids": (-1, -1),
            "query_positions": (-1, -1),
            "key_positions": (-1, -1),
            "write_index": (-1,),
            "logit_rows": (-1,),
            "past_key_values.0.key": (-1, 8, -1, 64),
            "past_key_values.0.value": (-1, 8, 384, 64),
            "model.embed_tokens.weight": (201088, 2880),
        }
    )
    options = EngineOptions(max_batch=2, max_prompt=32, max_context=300, max_logits=5)
    add_profiles(network, network, network, options)
    assert PROFILES == ("decode", "prefill")
    decode, prefill = network.added
    same = {
        "key_positions": ((1, 128), (1, 384), (2, 384)),
        "write_index": ((1,), (1,), (2,)),
        "past_key_values.0.key": ((1, 8, 128, 64), (1, 8, 384, 64), (2, 8, 384, 64)),
        "past_key_values.0.value": ((1, 8, 384, 64), (1, 8, 384, 64), (2, 8, 384, 64)),
    }
    one, prompt = ((1, 1), (1, 1), (2, 1)), ((1, 1), (1, 32), (2, 32))
    assert decode == same | {"input_ids": one, "query_positions": one, "logit_rows": ((1,), (1,), (2,))}
    assert prefill == same | {"input_ids": prompt, "query_positions": prompt, "logit_rows": ((1,), (1,), (5,))}


def test_numbers_are_as_the_graph_says(folder: Path, child_is) -> None:
    """Without TF32, which would round float32 matrices to 10 bits, and strongly typed."""
    child_is(
        "import sys\n"
        "import tensorrt_rtx as trt\n"
        "from gptoss_export.engines.tensorrt import build_child\n"
        "before = build_child.add_profiles\n"
        "def look(builder, config, network, options):\n"
        "    typed = network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)\n"
        "    print('tf32', config.get_flag(trt.BuilderFlag.TF32), 'typed', typed, file=sys.stderr)\n"
        "    before(builder, config, network, options)\n"
        "build_child.add_profiles = look\n"
        "sys.exit(build_child.main())\n"
    )
    result = build_engine(graph(folder, STATIC), folder / "engine.plan", EngineOptions())
    assert "tf32 False typed True" in result.log


def test_heads_are_not_dynamic(folder: Path) -> None:
    text = DYNAMIC.replace("float16[B,2,C,8]", "float16[B,N,C,8]")
    assert "past_key_values.0.key has the shape [-1, -1, -1, 8]" in refusal(folder, graph(folder, text)).what


@pytest.mark.parametrize(
    ("text", "operator"),
    [
        ("g (float16[2,4] x) => (int64[2,N] y) { y = NonZero(x) }", "NonZero"),
        ("g (float16[2,4] x) => (float16[2,4] y) { y = NoSuchOperator(x) }", "NoSuchOperator"),
    ],
)
def test_a_refused_operator_is_named(folder: Path, text: str, operator: str) -> None:
    error = refusal(folder, graph(folder, text))
    assert f"TensorRT for RTX 1.7.1.116 refuses {operator}" in error.what
    assert "cudaError" not in error.what


def test_a_missing_driver_is_not_blamed(folder: Path) -> None:
    """Without a GPU, RTX ends many of its messages with a complaint about the driver."""
    text = """g (float16[B,2,C,8] past, float16[B,2,S,8] new, int64[B] write_index) => (float16[B,2,C,8] y) {
        y = TensorScatter <axis = 2> (past, new, write_index)
    }"""
    error = refusal(folder, graph(folder, text, opset=24))
    assert "The KV cache tensor must have a static sequence length dimension" in error.what
    assert "cudaError" not in error.what


def test_what_is_no_onnx_file(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\xff" * 100)
    assert "cannot be read as ONNX" in refusal(folder, folder / "model.onnx").what


def test_without_the_package(folder: Path) -> None:
    path = graph(folder, STATIC)
    with pytest.raises(TargetUnavailableError, match="tensorrt is not installed"):
        build_engine(path, folder / "engine.plan", EngineOptions(flavor="tensorrt"))


@pytest.fixture
def enterprise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `tensorrt` that is RTX inside, with the interface of version 10 where that is smaller."""
    site = tmp_path / "site"
    (site / "tensorrt").mkdir(parents=True)
    (site / "tensorrt_libs").mkdir()
    (site / "tensorrt_libs" / "__init__.py").touch()
    (site / "tensorrt_libs" / "libnvinfer.so.10").touch()
    (site / "tensorrt" / "__init__.py").write_text(
        "import tensorrt_rtx\n"
        "from tensorrt_rtx import *\n"
        "__version__ = '10.16.0.1'\n"
        "class Builder(tensorrt_rtx.Builder):\n"
        "    @property\n"
        "    def build_serialized_network_to_stream(self): raise AttributeError\n"
        "class NetworkDefinitionCreationFlag: pass\n"
    )
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))


def test_tensorrt_needs_a_gpu_to_build(folder: Path, enterprise: None) -> None:
    if gpu_problem() is None:
        pytest.skip("there is a GPU")
    path = graph(folder, STATIC)
    with pytest.raises(TargetUnavailableError, match="builds for the GPU of the host") as caught:
        build_engine(path, folder / "engine.plan", EngineOptions(flavor="tensorrt"))
    assert "flavor rtx" in caught.value.next_step


def test_both_packages_are_built_with_in_the_same_way(
    folder: Path, enterprise: None, child_is, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = os.environ["PYTHONPATH"]
    child_is(
        "import sys\n"
        "from gptoss_export.engines.tensorrt import build_child\n"
        "build_child.gpu_problem = lambda: None\n"
        "sys.exit(build_child.main())\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}:{site}")
    path, engine = graph(folder, DYNAMIC), folder / "engine.plan"
    result = build_engine(path, engine, EngineOptions())
    assert (result.flavor, result.version) == ("tensorrt", "10.16.0.1")
    assert list(result.seconds) == ["parse", "build", "write"]
    assert result.sha256 == hashlib.sha256(engine.read_bytes()).hexdigest()
    engine.unlink()
    error = refusal(folder, path, EngineOptions(compute_capabilities=("8.6",)))
    assert "compute capabilities can be chosen with TensorRT for RTX" in error.what


def test_an_older_engine_survives_a_failed_build(folder: Path) -> None:
    path, engine = graph(folder, "g (float16[2,4] x) => (int64[2,N] y) { y = NonZero(x) }"), folder / "engine.plan"
    engine.write_bytes(b"older")
    with pytest.raises(EngineBuildError):
        build_engine(path, engine, EngineOptions())
    assert engine.read_bytes() == b"older"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "import os, sys; sys.stderr.write('[E] the last words\\n'); sys.stderr.flush(); os.abort()",
            "died of SIGABRT",
        ),
        ("import os, sys; os.write(2, b'noise\\nthe last words\\n'); os._exit(3)", "ended with code 3"),
        ("import os; os.write(2, b'the last words'); os.write(1, b'{\"event\": \"resu'); os.abort()", "SIGABRT"),
        ("import os; os.write(2, b'the last words' + b'x' * 10**7); os.write(2, b'\\nthe last words')", "code 0"),
    ],
)
def test_a_child_that_dies(folder: Path, child_is, source: str, says: str) -> None:
    child_is(source)
    error = refusal(folder, graph(folder, STATIC))
    assert says in error.what
    assert error.what.endswith("the last words")
    assert len(error.what) < 1000


def test_a_child_that_is_killed_names_memory_and_the_need(folder: Path, child_is) -> None:
    child_is("import os; os.write(2, b'[E] the last words\\n'); os.kill(os.getpid(), 9)")
    path = graph(folder, STATIC)
    with pytest.raises(OutOfMemoryError) as caught:
        build_engine(path, folder / "engine.plan", EngineOptions(), ram_bytes=6_500_000_000)
    assert "was killed, most likely for its memory; it takes about 6.5 GB; " in caught.value.what
    assert caught.value.what.endswith("are free now: the last words")
    assert [item.name for item in folder.iterdir()] == ["model.onnx"]


def test_a_child_that_dies_in_the_middle_of_writing(folder: Path, child_is) -> None:
    child_is(
        "import json, os, sys\n"
        "request = json.load(sys.stdin)\n"
        "open(request['engine'], 'wb').write(b'half an engine')\n"
        "os.abort()\n"
    )
    refusal(folder, graph(folder, STATIC))


def test_a_full_disk(folder: Path, child_is) -> None:
    child_is(
        "import sys\n"
        "from gptoss_export.engines.tensorrt import build_child\n"
        "class Writer(build_child._Writer):\n"
        "    def __init__(self, *args):\n"
        "        super().__init__(*args)\n"
        "        self._file = open('/dev/full', 'wb')\n"
        "build_child._Writer = Writer\n"
        "sys.exit(build_child.main())\n"
    )
    path = graph(folder, STATIC)
    with pytest.raises(DiskSpaceError, match="no space left"):
        build_engine(path, folder / "engine.plan", EngineOptions())
    assert [item.name for item in folder.iterdir()] == ["model.onnx"]


def test_nothing_is_imported_from_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = graph(folder, STATIC)
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "onnx.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(elsewhere)
    assert build_engine(path, folder / "engine.plan", EngineOptions()).nbytes


SLOW_CHILD = """
import os, sys, time
from pathlib import Path
from gptoss_export.engines.tensorrt import build_child

def build(onnx_path, engine, *rest):
    engine.write_bytes(b"half an engine")
    Path("PID_FILE").write_text(str(os.getpid()))
    time.sleep(60)

build_child.build = build
sys.exit(build_child.main())
"""

PARENT = """
import sys
from pathlib import Path
from gptoss_export.engines.tensorrt import build
from gptoss_export.engines.tensorrt.network import PROFILES, add_profiles
from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.exporter.interrupt import terminate
import signal
signal.signal(signal.SIGTERM, terminate)
build.CHILD = "some_child"
folder = Path(sys.argv[1])
build.build_engine(folder / "model.onnx", folder / "engine.plan", EngineOptions())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("to_group", [False, True])
def test_signals(folder: Path, child_is, number: signal.Signals, to_group: bool) -> None:
    """Ctrl-C and SIGTERM leave nothing; after SIGKILL of the parent at least no process goes on."""
    pid_file = folder.parent / "child.pid"
    child_is(SLOW_CHILD.replace("PID_FILE", str(pid_file)))
    graph(folder, STATIC)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder)],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, Ctrl-C is ignored, and so it would be there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    child = int(_eventually(lambda: pid_file.exists() and pid_file.read_text()))
    (os.killpg if to_group else os.kill)(parent.pid, number)
    _, printed = parent.communicate(timeout=30)
    assert parent.returncode != 0
    _eventually(lambda: not _runs(child))
    if number != signal.SIGKILL:
        assert [path.name for path in folder.iterdir()] == ["model.onnx"]
        assert "EngineBuildError" not in printed
    else:
        for left in (folder.parent / "temporary").iterdir():
            (left / "libtensorrt_rtx.so").unlink()
            left.rmdir()


def _eventually(condition):
    deadline = time.monotonic() + 30
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)
    return value


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
