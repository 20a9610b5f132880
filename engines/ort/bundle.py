"""The kernel library as a file of the artifact, for users who have no gptoss-export: C++, C#, onnxruntime-genai."""

from __future__ import annotations

import json
from pathlib import Path

from gptoss_export.engines.ort.genai import GENAI_FILE, genai_json
from gptoss_export.engines.ort.library import LIBRARY_FILE
from gptoss_export.exporter.weights import WeightsMode, place_weights


def bundle_kernels(library: Path, folder: Path) -> str:
    """Copies the library into `folder`, makes its genai_config.json name it, and says so.

    onnxruntime-genai looks for a relative `custom_ops_library` in the model's folder first, and loads it from nowhere
    but there, the folders of execution providers and the current one. Raises DiskSpaceError.
    """
    place_weights({LIBRARY_FILE: library}, [folder], WeightsMode.COPY)
    config_file = folder / GENAI_FILE
    if config_file.is_file():
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config["model"]["decoder"]["session_options"]["custom_ops_library"] = LIBRARY_FILE
        config_file.write_text(genai_json(config), encoding="utf-8")
    return f"{LIBRARY_FILE}: bundled, for other users of ONNX Runtime to register; gptoss-export loads its own"
