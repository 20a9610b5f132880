"""onnxruntime-genai runs the artifact's folder with its own loop and says what our runner says."""

from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest

from gptoss_export.engines.targets import TARGETS

PROMPT = (340, 1145, 466)  # The import statement


@pytest.mark.parametrize("target", [name for name in TARGETS if not name.startswith("trt-")])
def test_genai_continues_as_our_runner_does(target: str, tiny_builds: dict[str, Path]) -> None:
    folder = tiny_builds[target]
    runner = TARGETS[target].open_runner(folder, 1)
    step = runner.forward(np.array([PROMPT]))
    ours = []
    for _ in range(24):  # beyond the window of 16
        ours.append(int(step.logits[0, -1].argmax()))
        step = runner.forward(np.array([[ours[-1]]]), cache=step.cache)

    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(PROMPT) + len(ours))
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(PROMPT, np.int32))
    theirs = []
    while not generator.is_done() and len(theirs) < len(ours):
        generator.generate_next_token()
        theirs.append(int(generator.get_next_tokens()[0]))
    assert theirs == ours
