"""The Dockerfiles, read: there is no engine to build them here, so what can be checked without one is checked."""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PIN = re.compile(r'"([A-Za-z0-9_.-]+)==([^"+]+)(\+[a-z0-9]+)?"')


@dataclass(frozen=True)
class Instruction:
    keyword: str
    text: str


def instructions(path: Path) -> list[Instruction]:
    """Without comments, lines that go on joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def stages(path: Path) -> list[list[Instruction]]:
    found: list[list[Instruction]] = []
    for instruction in instructions(path):
        if instruction.keyword == "FROM":
            found.append([])
        found[-1].append(instruction)
    return found


def of(stage: list[Instruction], keyword: str) -> list[str]:
    return [instruction.text for instruction in stage if instruction.keyword == keyword]


def pinned(requirement: str) -> dict[str, str]:
    match = re.fullmatch(r"([A-Za-z0-9_.-]+)==([^;\s]+).*", requirement)
    return {match[1].lower().replace("_", "-"): match[2]} if match else {}


def project_pins() -> dict[str, str]:
    project = PROJECT["project"]
    extras = [r for extra in project["optional-dependencies"].values() for r in extra]
    pins: dict[str, str] = {}
    for requirement in (*project["dependencies"], *extras, *PROJECT["build-system"]["requires"]):
        pins |= pinned(requirement)
    return pins


def test_there_is_an_image_for_each_family() -> None:
    assert [path.name for path in DOCKERFILES] == ["ort-cpu.Dockerfile", "tensorrt.Dockerfile"]


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.name)
def dockerfile(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_every_base_is_pinned(dockerfile: Path) -> None:
    bases = [of(stage, "FROM")[0].split()[0] for stage in stages(dockerfile)]
    for base in bases:
        name, _, tag = base.rpartition(":")
        assert name, base
        assert re.match(r"\d+\.\d+", tag), base


def test_it_is_built_in_one_stage_and_runs_in_another(dockerfile: Path) -> None:
    builder, final = stages(dockerfile)
    assert of(builder, "FROM")[0].endswith(" AS builder")
    assert any("pip wheel" in run for run in of(builder, "RUN"))
    for text in of(final, "COPY"):
        assert text.startswith("--from=builder "), "sources stay in the builder"
    for text in of(final, "RUN"):
        assert "apt-get" not in text
        assert "pip wheel" not in text


def test_it_does_not_run_as_root(dockerfile: Path) -> None:
    final = stages(dockerfile)[-1]
    assert of(final, "USER") == ["10001:10001"], "by number, so that a cluster can see that it is not root"
    assert any("useradd --uid 10001 " in run for run in of(final, "RUN"))
    after = [i.keyword for i in final[[i.keyword for i in final].index("USER") :]]
    assert "RUN" not in after
    assert "COPY" not in after


def test_its_entry_point_is_the_tool(dockerfile: Path) -> None:
    final = stages(dockerfile)[-1]
    (entry,) = of(final, "ENTRYPOINT")
    assert json.loads(entry) == ["gptoss-export"]
    assert json.loads(entry)[0] in PROJECT["project"]["scripts"]
    assert [json.loads(text) for text in of(final, "CMD")] == [["--help"]]
    environment = " ".join(of(final, "ENV"))
    assert "PATH=/opt/gptoss-export/bin:$PATH" in environment
    assert any("/opt/gptoss-export" in text for text in (*of(final, "COPY"), *of(final, "RUN")))


def test_every_source_exists_and_goes_to_the_builder(dockerfile: Path) -> None:
    ignore = dockerfile.with_name(f"{dockerfile.name}.dockerignore").read_text().splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*", "nothing but what is named"
    named = {rule[1:] for rule in rules if rule.startswith("!")}
    sources = []
    for text in of(stages(dockerfile)[0], "COPY"):
        *names, _target = text.split()
        sources += names
    assert set(sources) == named
    for name in sources:
        assert (ROOT / name).exists(), name


def test_the_wheel_needs_nothing_that_the_builder_does_not_get(dockerfile: Path) -> None:
    copied = {name for text in of(stages(dockerfile)[0], "COPY") for name in text.split()[:-1]}
    packages = set(PROJECT["tool"]["scikit-build"]["wheel"]["packages"].values())
    cmake = PROJECT["tool"]["scikit-build"]["cmake"]["source-dir"].split("/")[0]
    files = {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml"}
    assert packages | {cmake} | files <= copied


def test_what_pip_installs_is_pinned_as_in_the_project(dockerfile: Path) -> None:
    pins = project_pins()
    found = {}
    for stage in stages(dockerfile):
        for text in of(stage, "RUN"):
            for command in text.split("&&"):
                if "pip" not in command or "install" not in command:
                    continue
                assert "--no-cache-dir" in command
                arguments = command.split(" install ", 1)[1].split()
                options_with_value = {"--target", "--index-url", "--extra-index-url"}
                plain = [
                    argument
                    for before, argument in zip(["", *arguments], arguments, strict=False)
                    if not argument.startswith("-") and before not in options_with_value
                ]
                for argument in plain:
                    assert argument == "/wheels/*.whl" or PIN.fullmatch(argument), argument
            found |= {name: version for name, version, _ in PIN.findall(text)}
    assert {"scikit-build-core", "torch"} <= found.keys()
    for name, version in found.items():
        if name in pins:
            assert version == pins[name], name


def test_tensorrt_is_the_one_of_the_image_and_of_a_version_that_is_supported() -> None:
    from gptoss_export.engines.tensorrt.flavor import _PACKAGES

    text = (ROOT / "docker" / "tensorrt.Dockerfile").read_text()
    match = re.search(r"TensorRT (\d+)\.(\d+)", text)
    assert match is not None
    package = _PACKAGES["tensorrt"]
    assert package.at_least <= (int(match[1]), int(match[2])) < package.below
    assert not re.search(r'"tensorrt', text)


def test_the_readme_names_every_image_and_base(dockerfile: Path) -> None:
    readme = (ROOT / "docker" / "README.md").read_text()
    assert f"docker/{dockerfile.name}" in readme
    assert of(stages(dockerfile)[-1], "FROM")[0] in readme


def test_caches_are_kept_from_the_builder(dockerfile: Path) -> None:
    rules = dockerfile.with_name(f"{dockerfile.name}.dockerignore").read_text().splitlines()
    assert any(fnmatch.fnmatch("engines/ort/__pycache__", rule.replace("**/", "*/")) for rule in rules)
