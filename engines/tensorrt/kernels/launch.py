"""Which kernels run for so many tokens, over which grids and with which arguments: plain data, nothing is compiled.

    shape = MoEShape(32, 2880, 2880, 4, "fp16", 1.702, 7.0)
    workspace_bytes(shape, tokens=512)
    for launch in plan(shape, tokens=512):
        launch.kernel, launch.grid, launch.arguments

The same launches drive the GPU (driver.py) and Triton's interpreter (the tests). Grids depend on the number of tokens
only, never on routing, so a CUDA graph may record them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Dtype = Literal["fp16", "bf16", "fp32"]
DTYPE_BYTES: dict[str, int] = {"fp16": 2, "bf16": 2, "fp32": 4}

DECODE_TOKENS = 8
"""Up to so many tokens each reads its experts for itself; beyond, tokens of an expert share one reading."""

BUFFERS = (
    "x",
    "weights",
    "experts",
    "gate_up_blocks",
    "gate_up_scales",
    "gate_up_bias",
    "down_blocks",
    "down_scales",
    "down_bias",
    "y",
)
"""What a launch may name: the operator's inputs in their order, and its output."""

_ALIGNMENT = 256
_MAX_ASSIGNMENTS = 1 << 20
_GROUP_BLOCK = 1024
_SUM_BLOCK = 1024
_TILES = {"small": 16, "large": 64}
"""Tokens a program: small where experts have few each."""


@dataclass(frozen=True)
class MoEShape:
    """The experts of one model. hidden and intermediate are multiples of 32; dtype is the target's type.

    Raises ValueError for sizes that the kernels' 32-bit offsets cannot take, and for what is no shape at all.
    """

    experts: int
    hidden: int
    intermediate: int
    top_k: int
    dtype: Dtype
    swiglu_alpha: float
    swiglu_limit: float

    def __post_init__(self) -> None:
        limits = {"experts": 4096, "hidden": 1 << 16, "intermediate": 1 << 16, "top_k": 64}
        for name, limit in limits.items():
            if type(getattr(self, name)) is not int or not 0 < getattr(self, name) <= limit:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not between 1 and {limit}")
        if self.hidden % 32 or self.intermediate % 32 or self.top_k > self.experts:
            raise ValueError(
                f"hidden {self.hidden} and intermediate {self.intermediate} must be multiples of 32, "
                f"and top_k {self.top_k} at most {self.experts}"
            )
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {self.dtype!r}")
        if any(type(n) is not float or not math.isfinite(n) for n in (self.swiglu_alpha, self.swiglu_limit)):
            raise ValueError(f"swiglu of alpha {self.swiglu_alpha!r} and limit {self.swiglu_limit!r}")


@dataclass(frozen=True)
class Buffer:
    """A pointer to one of BUFFERS."""

    name: str


@dataclass(frozen=True)
class Workspace:
    """A pointer into the workspace, `offset` bytes from its start."""

    offset: int


Argument = Buffer | Workspace | int


@dataclass(frozen=True)
class Launch:
    """One kernel launch. arguments: in the order of the kernel's parameters; an int is an int32."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class KernelSpec:
    """One kernel to compile for a shape.

    module and function: where it stands in this package. parameters: (name, Triton's type) in order. constants: its
    constexpr parameters. warps and stages: of Triton's options num_warps and num_stages.
    """

    module: str
    function: str
    parameters: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int | float], ...]
    warps: int
    stages: int


@dataclass(frozen=True)
class _Scratch:
    """Offsets in the workspace, in bytes, and its size."""

    a: int
    parts: int
    counts: int
    lists: int
    size: int


def _scratch(shape: MoEShape, tokens: int) -> _Scratch:
    if not 0 < tokens <= max_tokens(shape):
        raise ValueError(f"{tokens} tokens, not between 1 and {max_tokens(shape)}")
    assignments = tokens * shape.top_k
    sizes = [assignments * shape.intermediate * DTYPE_BYTES[shape.dtype]]
    if tokens > DECODE_TOKENS:
        sizes += [assignments * shape.hidden * 4, shape.experts * 4, shape.experts * tokens * 4]
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    offsets += [offsets[-1]] * (5 - len(offsets))
    return _Scratch(*offsets)


def max_tokens(shape: MoEShape) -> int:
    """The most tokens a call can take: CUDA's grids end at 65535 tiles."""
    return _MAX_ASSIGNMENTS // shape.top_k


def workspace_bytes(shape: MoEShape, tokens: int) -> int:
    """Bytes of scratch memory for up to `tokens` tokens; it never shrinks with more of them."""
    return _scratch(shape, tokens).size


def plan(shape: MoEShape, tokens: int) -> tuple[Launch, ...]:
    """The launches for `tokens` >= 1 tokens, to run one after the other. The workspace is aligned to 256 bytes."""
    scratch = _scratch(shape, tokens)
    a, x, weights, experts, y = Workspace(scratch.a), Buffer("x"), Buffer("weights"), Buffer("experts"), Buffer("y")
    gate_up = tuple(Buffer(f"gate_up_{part}") for part in ("blocks", "scales", "bias"))
    down = tuple(Buffer(f"down_{part}") for part in ("blocks", "scales", "bias"))
    assignments, E, H, I = tokens * shape.top_k, shape.experts, shape.hidden, shape.intermediate  # noqa: E741
    if tokens <= DECODE_TOKENS:
        rows_up, rows_down = (_decode_rows(name) for name in ("decode_gate_up", "decode_down"))
        return (
            Launch("decode_gate_up", (assignments, 2 * I // rows_up, 1), (x, experts, *gate_up, a)),
            Launch("decode_down", (tokens, H // rows_down, 1), (a, weights, experts, *down, y)),
        )
    size = "small" if assignments <= 2 * _TILES["small"] * E else "large"
    sizes = _prefill_sizes(shape, size)
    tile, rows = sizes["TILE"], sizes["ROWS"]
    # Each expert that is hit at all wastes less than a tile.
    tiles = (assignments + min(E, assignments) * (tile - 1)) // tile
    counts, lists, parts = Workspace(scratch.counts), Workspace(scratch.lists), Workspace(scratch.parts)
    return (
        Launch("group_by_expert", (E, 1, 1), (experts, counts, lists, tokens)),
        Launch(f"prefill_gate_up_{size}", (-(-2 * I // rows), tiles, 1), (x, counts, lists, *gate_up, a, tokens)),
        Launch(f"prefill_down_{size}", (-(-H // rows), tiles, 1), (a, weights, counts, lists, *down, parts, tokens)),
        Launch("sum_places", (tokens, -(-H // _SUM_BLOCK), 1), (parts, y)),
    )


def kernel_specs(shape: MoEShape) -> dict[str, KernelSpec]:
    """Every kernel that `plan` may name for this shape."""
    E, H, I, K = shape.experts, shape.hidden, shape.intermediate, shape.top_k  # noqa: E741
    swiglu = {"ALPHA": shape.swiglu_alpha, "LIMIT": shape.swiglu_limit}
    t = f"*{shape.dtype}"
    mxfp4 = (("blocks", "*i32"), ("scales", "*u8"), ("bias", "*bf16"))
    x, a, weights, experts = ("x", t), ("a", t), ("weights", "*fp32"), ("experts", "*i32")
    counts, lists, parts, y = ("counts", "*i32"), ("lists", "*i32"), ("parts", "*fp32"), ("y", "*fp32")
    tokens = ("tokens", "i32")

    def spec(
        module: str,
        function: str,
        parameters: tuple[tuple[str, str], ...],
        constants: dict[str, int | float],
        warps: int = 4,
        stages: int = 1,
    ) -> KernelSpec:
        return KernelSpec(module, function, parameters, tuple(constants.items()), warps, stages)

    specs = {
        "decode_gate_up": spec(
            "mxfp4_decode",
            "decode_gate_up",
            (x, experts, *mxfp4, a),
            {"H": H, "I": I, "K": K, **swiglu, "ROWS": _decode_rows("decode_gate_up"), "WORDS": _words(H, 64)},
        ),
        "decode_down": spec(
            "mxfp4_decode",
            "decode_down",
            (a, weights, experts, *mxfp4, y),
            {"H": H, "I": I, "K": K, "ROWS": _decode_rows("decode_down"), "WORDS": _words(I, 64)},
        ),
        "group_by_expert": spec(
            "mxfp4_prefill",
            "group_by_expert",
            (experts, counts, lists, tokens),
            {"E": E, "K": K, "BLOCK": _GROUP_BLOCK},
        ),
        "sum_places": spec("mxfp4_prefill", "sum_places", (parts, y), {"H": H, "K": K, "BLOCK": _SUM_BLOCK}),
    }
    power = 1 << (E - 1).bit_length()
    for size in _TILES:
        sizes = {"E_POWER": power, **_prefill_sizes(shape, size)}
        specs[f"prefill_gate_up_{size}"] = spec(
            "mxfp4_prefill",
            "prefill_gate_up",
            (x, counts, lists, *mxfp4, a, tokens),
            {"H": H, "I": I, "E": E, "K": K, **swiglu, **sizes},
            stages=3,
        )
        specs[f"prefill_down_{size}"] = spec(
            "mxfp4_prefill",
            "prefill_down",
            (a, weights, counts, lists, *mxfp4, parts, tokens),
            {"H": H, "I": I, "E": E, **sizes},
            stages=3,
        )
    return specs


def _decode_rows(kernel: str) -> int:
    """Rows of weights a program: divisors of 32, hence of every size. Down has fewer rows to keep all SMs busy."""
    return {"decode_gate_up": 16, "decode_down": 8}[kernel]


def _words(columns: int, most: int) -> int:
    """Words of eight weights a step, a power of two."""
    return min(most, 1 << (columns // 8 - 1).bit_length())


def _prefill_sizes(shape: MoEShape, size: str) -> dict[str, int]:
    """Tokens, rows and columns that a program multiplies at a time; the columns are one group of MXFP4."""
    if shape.dtype == "fp32":
        return {"TILE": min(_TILES[size], 32), "ROWS": 64, "WIDTH": 32}
    return {"TILE": _TILES[size], "ROWS": 64 if size == "small" else 128, "WIDTH": 32}
