"""The MoE kernels in Triton's interpreter against float64: the launches that a GPU would get, on the CPU.

The interpreter has to be chosen before triton is imported, so every case runs in one child process: this file.
"""

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gptoss_export.engines.tensorrt.kernels.launch import (
    DECODE_TOKENS,
    Buffer,
    MoEShape,
    Workspace,
    kernel_specs,
    plan,
    workspace_bytes,
)
from gptoss_export.exporter.checkpoint.mxfp4 import decode

ALPHA, LIMIT = 1.702, 7.0
NUMPY = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}
UNIT = {"fp16": 2.0**-11, "bf16": 2.0**-8, "fp32": 0.0}
"""Unit roundoff. Rounding a to the type is an error of at most this, and of 0.42 times this in RMS (significands
distributed as leading digits are), which the down projection passes on: y's error is about 0.42 of it too."""

CANARY = 4096


@dataclass(frozen=True)
class Case:
    """E experts, H hidden, I intermediate, K experts a token, T tokens. kind chooses the routing or the scales."""

    E: int
    H: int
    I: int  # noqa: E741
    K: int
    T: int
    kind: str = "random"

    def shape(self, dtype: Any) -> MoEShape:
        return MoEShape(self.E, self.H, self.I, self.K, dtype, ALPHA, LIMIT)


CASES = {
    "one_token": Case(4, 64, 160, 2, 1),
    "odd_decode": Case(5, 96, 64, 3, 3),
    "last_decode": Case(2, 32, 32, 1, DECODE_TOKENS),
    "ties_decode": Case(3, 64, 32, 3, 1, "ties"),
    "extreme_decode": Case(4, 160, 32, 2, 2, "extreme"),
    "first_prefill": Case(5, 96, 64, 3, DECODE_TOKENS + 1),
    "large_tiles": Case(3, 64, 160, 2, 83),
    "one_expert": Case(3, 64, 64, 1, 71, "one_expert"),
    "some_experts_idle": Case(8, 64, 32, 2, 11, "idle"),
    "ties_prefill": Case(3, 32, 64, 3, 9, "ties"),
    "extreme_prefill": Case(4, 160, 64, 2, 13, "extreme"),
}


def operands(rng: np.random.Generator, c: Case, dtype: str) -> dict[str, np.ndarray]:
    experts = np.argsort(rng.random((c.T, c.E)), axis=1)[:, : c.K].astype(np.int32)
    weights = rng.random((c.T, c.K), dtype=np.float32)
    weights[rng.random((c.T, c.K)) < 0.1] = 0
    if c.kind == "ties":
        weights[:] = 1 / c.K
    if c.kind == "one_expert":
        experts[:] = 1
    if c.kind == "idle":
        experts = experts % 2 * 5
        experts[:, 1] = 5 - experts[:, 0]
    o = {
        "x": rng.standard_normal((c.T, c.H)),
        "weights": weights,
        "experts": experts,
        "gate_up_blocks": rng.integers(0, 256, (c.E, 2 * c.I, c.H // 32, 16), dtype=np.uint8),
        "gate_up_scales": rng.integers(120, 125, (c.E, 2 * c.I, c.H // 32), dtype=np.uint8),
        "gate_up_bias": rng.standard_normal((c.E, 2 * c.I)).astype(ml_dtypes.bfloat16),
        "down_blocks": rng.integers(0, 256, (c.E, c.H, c.I // 32, 16), dtype=np.uint8),
        "down_scales": rng.integers(118, 123, (c.E, c.H, c.I // 32), dtype=np.uint8),
        "down_bias": rng.standard_normal((c.E, c.H)).astype(ml_dtypes.bfloat16),
    }
    if c.kind == "extreme":
        extreme(o, rng, dtype)
    o["x"] = o["x"].astype(NUMPY[dtype])
    return o


def extreme(o: dict[str, np.ndarray], rng: np.random.Generator, dtype: str) -> None:
    """Scales from end to end of e8m0 with activations such that every product is about one, as far as the type goes."""
    bytes_ = np.array([0, 1, 100, 150, 254])
    o["gate_up_scales"][:] = bytes_
    # 6 * 2^127 is no float32; 1.5 * 2^127 is.
    o["gate_up_blocks"][:, :, bytes_ == 254] &= 0xBB
    exponent = 127.0 - bytes_
    if dtype == "fp16":
        exponent = np.array([14.0, 14.0, 14.0, -14.0, -np.inf])
        o["gate_up_scales"][..., 2:4] = (111, 143)
    with np.errstate(under="ignore"):
        o["x"] = np.sign(o["x"]) * np.repeat(2.0**exponent, 32) * rng.uniform(0.5, 0.9, o["x"].shape)
    o["gate_up_bias"][:] = 0
    groups = o["down_scales"].shape[-1]
    o["down_scales"][:, 0::3] = 0
    o["down_scales"][:, 1::3] = rng.integers(0, 2, (1, groups)) + 230
    o["down_scales"][:, 2::3] = 1
    o["down_bias"][:] = 0


def float64(o: dict[str, np.ndarray], rounded_to: Any) -> np.ndarray:
    """The definition; a is rounded to the type given."""
    w1, w2 = (decode(o[f"{m}_blocks"], o[f"{m}_scales"]).astype(np.float64) for m in ("gate_up", "down"))
    x, b1, b2 = (o[name].astype(np.float64) for name in ("x", "gate_up_bias", "down_bias"))
    y = np.zeros(x.shape)
    for t in range(len(x)):
        for weight, e in zip(o["weights"][t].astype(np.float64), o["experts"][t], strict=True):
            h = w1[e] @ x[t] + b1[e]
            gate, up = np.minimum(h[0::2], LIMIT), np.clip(h[1::2], -LIMIT, LIMIT)
            with np.errstate(over="ignore"):
                a = (gate / (1 + np.exp(-ALPHA * gate)) * (up + 1)).astype(rounded_to).astype(np.float64)
            y[t] += weight * (w2[e] @ a + b2[e])
    return y


def execute(shape: MoEShape, o: dict[str, np.ndarray], tokens: int) -> np.ndarray:
    """Runs the plan in the interpreter. Scratch memory and y begin as NaN; nothing may be written behind them."""
    import torch

    types = {
        "*fp16": torch.float16,
        "*bf16": torch.bfloat16,
        "*fp32": torch.float32,
        "*i32": torch.int32,
        "*u8": torch.uint8,
    }
    size, y_size = workspace_bytes(shape, tokens), tokens * shape.hidden * 4
    buffers = {name: torch.from_numpy(a.reshape(-1).view(np.uint8).copy()) for name, a in o.items()}
    buffers["y"] = torch.full((y_size + CANARY,), 255, dtype=torch.uint8)
    workspace = torch.full((size + CANARY,), 255, dtype=torch.uint8)
    specs = kernel_specs(shape)
    for launch in plan(shape, tokens):
        spec = specs[launch.kernel]
        module = importlib.import_module(f"gptoss_export.engines.tensorrt.kernels.{spec.module}")
        arguments = []
        for argument, (_, kind) in zip(launch.arguments, spec.parameters, strict=True):
            match argument:
                case Buffer(name):
                    arguments.append(buffers[name].view(types[kind]))
                case Workspace(offset):
                    arguments.append(workspace[offset:].view(types[kind]))
                case _:
                    assert kind == "i32"
                    arguments.append(argument)
        getattr(module, spec.function)[launch.grid](*arguments, **dict(spec.constants))
    assert (workspace[size:] == 255).all(), "wrote behind the workspace"
    assert (buffers["y"][y_size:] == 255).all(), "wrote behind y"
    return buffers["y"][:y_size].view(torch.float32).numpy().reshape(tokens, shape.hidden)


def problem(name: str, dtype: str) -> tuple[MoEShape, dict[str, np.ndarray]]:
    case = CASES[name]
    seed = list(CASES).index(name)
    return case.shape(dtype), operands(np.random.default_rng(seed), case, dtype)


def give_the_interpreter_bfloat16() -> None:
    """It truncates where a GPU rounds to nearest even, and multiplies matrices of bfloat16 as if they were integers."""
    from triton import language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(handle.data.view(ml_dtypes.bfloat16).astype(np.float32), tl.float32)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar != tl.bfloat16:
            return cast(self, wide(src), dst_type)
        data = wide(src).data.astype(ml_dtypes.bfloat16).view(np.uint16)
        return interpreter.TensorHandle(data, tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), *rest)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot


def main(out: str) -> None:
    """In the interpreter: every case in every type, and the first tokens of a prompt as decoding sees them."""
    give_the_interpreter_bfloat16()
    results = {}
    for dtype in NUMPY:
        for name, case in CASES.items():
            shape, o = problem(name, dtype)
            results[f"{name}.{dtype}"] = execute(shape, o, case.T)
        shape, o = problem("first_prefill", dtype)
        first = {n: (o[n][:2] if n in ("x", "weights", "experts") else a) for n, a in o.items()}
        results[f"decoded.{dtype}"] = execute(shape, first, 2)
        shape, o = problem("one_token", dtype)
        results[f"again.{dtype}"] = execute(shape, o, 1)
    np.savez(out, **results)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    out = tmp_path_factory.mktemp("interpreter") / "y.npz"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__, out], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(out) as arrays:
        return dict(arrays)


def relative_rms(found: np.ndarray, expected: np.ndarray) -> float:
    scale = np.abs(expected).max()
    return float(np.sqrt((((found - expected) / scale) ** 2).sum() / ((expected / scale) ** 2).sum()))


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_the_definition(name: str, dtype: str, results: dict[str, np.ndarray]) -> None:
    """Against float64 with `a` rounded alike, what is left is float32 and the few roundings that it tips over: a tipped
    one costs a step of the type, and one in about UNIT / 2^-22 tips. Without that rounding, half of UNIT (see there).
    """
    _, o = problem(name, dtype)
    found = results[f"{name}.{dtype}"]
    tipped = 2 * UNIT[dtype] * np.sqrt(2.0**-22 / UNIT[dtype]) if UNIT[dtype] else 0.0
    alike = relative_rms(found, float64(o, NUMPY[dtype]))
    exact = relative_rms(found, float64(o, np.float64))
    print(f"{name} {dtype}: {alike:.1e} of {1e-6 + tipped:.1e}, {exact:.1e} of {1e-6 + UNIT[dtype] / 2:.1e}")
    assert 0 < alike <= 1e-6 + tipped
    assert 0 < exact <= 1e-6 + UNIT[dtype] / 2


@pytest.mark.parametrize("dtype", NUMPY)
def test_decode_and_prefill_agree(dtype: str, results: dict[str, np.ndarray]) -> None:
    decoded, prompt = results[f"decoded.{dtype}"], results[f"first_prefill.{dtype}"][:2]
    tipped = 2 * UNIT[dtype] * np.sqrt(2.0**-22 / UNIT[dtype]) if UNIT[dtype] else 0.0
    assert relative_rms(decoded, prompt.astype(np.float64)) <= 1e-6 + tipped


@pytest.mark.parametrize("dtype", NUMPY)
def test_the_same_inputs_give_the_same_bits(dtype: str, results: dict[str, np.ndarray]) -> None:
    assert results[f"one_token.{dtype}"].tobytes() == results[f"again.{dtype}"].tobytes()


def test_cases_cover_every_kernel() -> None:
    """Every kernel that is compiled is one that some case here launches."""
    launched = {launch.kernel for c in CASES.values() for launch in plan(c.shape("fp16"), c.T)}
    assert launched == set(kernel_specs(MoEShape(4, 64, 64, 2, "fp16", ALPHA, LIMIT)))


if __name__ == "__main__":
    main(sys.argv[1])
