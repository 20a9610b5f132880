"""The number formats of the TensorRT targets."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class Precision(Enum):
    """The type of matrices, attention and cache; everything else is float32."""

    FP16 = "fp16"
    BF16 = "bf16"
    FP32 = "fp32"

    @property
    def onnx_type(self) -> str:
        """ONNX's name of the type."""
        return {"fp16": "FLOAT16", "bf16": "BFLOAT16", "fp32": "FLOAT"}[self.value]

    @property
    def stored_type(self) -> str:
        """safetensors' name of the type."""
        return {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}[self.value]


LOWEST: Mapping[Precision, float] = {
    Precision.FP16: -65504.0,
    Precision.BF16: -3.3895313892515355e38,
    Precision.FP32: -3.4028234663852886e38,
}
"""Added to a masked score. Finite: no infinity is ever subtracted from another."""
