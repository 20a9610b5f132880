"""What a user may decide about a TensorRT engine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from gptoss_export.exporter.errors import EngineBuildError

FlavorChoice = Literal["auto", "tensorrt", "rtx"]
EngineWeights = Literal["external", "embedded"]

_COMPUTE_CAPABILITY = re.compile(r"\d{1,2}\.\d")


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built. Raises EngineBuildError for values that no engine can have.

    flavor: which package builds it, see `flavor.find_flavor`.
    engine_weights: `external`, the experts and the embedding are inputs of the engine, bound to the weights file
        when it is loaded; `embedded`, they are constants in the engine.
    max_batch: rows. max_prompt: positions of one call, per row. max_context: positions of one row in all.
    max_logits: positions of one call whose logits can be asked for, over all rows.
    plugin: the experts run in our kernels; otherwise TensorRT compiles their function body.
    compute_capabilities: the GPUs that an RTX engine is for, as "8.6"; empty means what the package does by itself,
        8.0 and later.
    """

    flavor: FlavorChoice = "auto"
    engine_weights: EngineWeights = "external"
    max_batch: int = 4
    max_prompt: int = 512
    max_context: int = 4096
    max_logits: int = 512
    plugin: bool = True
    compute_capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _one_of("flavor", self.flavor, ("auto", "tensorrt", "rtx"))
        _one_of("engine_weights", self.engine_weights, ("external", "embedded"))
        for name in ("max_batch", "max_prompt", "max_context", "max_logits"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise EngineBuildError(f"{name} is {value!r}", f"give a whole number from 1 on as {name}")
        _at_most("max_prompt", self.max_prompt, "max_context", self.max_context)
        _at_most("max_batch", self.max_batch, "max_logits", self.max_logits)
        if self.engine_weights == "embedded" and not self.plugin:
            raise EngineBuildError(
                "experts by their function body cannot be embedded: TensorRT takes constant bytes for plugins alone",
                "leave the weights external, or run the experts in our kernels",
            )
        for capability in self.compute_capabilities:
            if not _COMPUTE_CAPABILITY.fullmatch(capability):
                raise EngineBuildError(
                    f"{capability!r} is no compute capability", "write it as NVIDIA does, for example 8.6"
                )
        if len(set(self.compute_capabilities)) < len(self.compute_capabilities):
            raise EngineBuildError("a compute capability is named twice", "name each of them once")
        if self.compute_capabilities and self.flavor == "tensorrt":
            raise EngineBuildError(
                "compute capabilities can only be chosen with TensorRT for RTX; TensorRT builds for this host's GPU",
                "leave them out, or choose the flavor rtx",
            )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise EngineBuildError(f"{name} is {value!r}", f"choose one of {', '.join(allowed)}")


def _at_most(name: str, value: int, limit_name: str, limit: int) -> None:
    if value > limit:
        raise EngineBuildError(
            f"{name} is {value}, more than {limit_name}, {limit}", f"lower {name}, or raise {limit_name}"
        )
