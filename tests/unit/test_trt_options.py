"""The options of TensorRT engines as a user gives them; test_trt_flavor.py has what `EngineOptions` itself refuses."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.exporter.commands.engine import engine_options, engine_options_of
from gptoss_export.exporter.errors import EngineBuildError


def given(*arguments: str) -> EngineOptions:
    """What the command line makes of them."""
    found: list[EngineOptions] = []

    @click.command()
    @engine_options
    def command(**values: object) -> None:
        found.append(engine_options_of(values))

    command.main(list(arguments), standalone_mode=False)
    return found[0]


def test_nothing_given_is_the_default() -> None:
    assert given() == EngineOptions()
    assert EngineOptions().plugin
    assert EngineOptions().engine_weights == "external"


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--trt-flavor", "rtx"], EngineOptions(flavor="rtx")),
        (["--engine-weights", "embedded"], EngineOptions(engine_weights="embedded")),
        (["--trt-experts", "function"], EngineOptions(plugin=False)),
        (["--trt-experts", "plugin"], EngineOptions(plugin=True)),
        (["--max-batch", "7"], EngineOptions(max_batch=7)),
        (["--max-prompt", "9", "--max-context", "10"], EngineOptions(max_prompt=9, max_context=10)),
    ],
)
def test_every_option_arrives(arguments: list[str], options: EngineOptions) -> None:
    assert given(*arguments) == options


@pytest.mark.parametrize("batch", [1, 512, 513, 1000])
def test_one_row_of_logits_for_every_row_can_always_be_asked_for(batch: int) -> None:
    assert given("--max-batch", str(batch)).max_logits == max(512, batch)


def test_no_prompt_is_longer_than_the_text() -> None:
    assert given("--max-context", "100").max_prompt == 100
    with pytest.raises(EngineBuildError, match="max_prompt is 512, more than max_context, 100") as caught:
        EngineOptions(max_context=100)
    assert caught.value.exit_code == 33


def test_bytes_are_constants_of_a_plugin_alone() -> None:
    """What TensorRT itself says to it, after everything was written, names neither option."""
    with pytest.raises(EngineBuildError, match="function body cannot be embedded") as caught:
        given("--engine-weights", "embedded", "--trt-experts", "function")
    assert "external" in caught.value.next_step


@pytest.mark.parametrize("name", ["--max-batch", "--max-prompt", "--max-context"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", ""])
def test_sizes_are_whole_numbers_from_one_on(name: str, value: str) -> None:
    with pytest.raises(click.BadParameter) as caught:
        given(name, value)
    assert name in caught.value.format_message()


@pytest.mark.parametrize("name", ["--trt-flavor", "--engine-weights", "--trt-experts"])
def test_other_words_are_refused(name: str) -> None:
    with pytest.raises(click.BadParameter) as caught:
        given(name, "lean")
    assert name in caught.value.format_message()


def test_the_help_names_every_option_and_its_default() -> None:
    @click.command()
    @engine_options
    def command(**values: object) -> None:
        pass

    text = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    assert all(name in text for name in ("--trt-flavor", "--engine-weights", "--trt-experts", "--max-context"))
    for value in ("auto", "external", "plugin", "4", "512", "4096"):
        assert f"[default: {value}" in text


def test_options_are_read_without_anything_heavy() -> None:
    heavy = "{'torch', 'onnx', 'onnxruntime', 'tensorrt_rtx', 'triton', 'cuda', 'transformers'}"
    code = f"import sys, gptoss_export.exporter.commands.engine; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
