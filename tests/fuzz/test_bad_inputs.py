"""Every bad input by name: its exit code, two lines on stderr, no traceback, and not a byte written."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptoss_export.engines.external_data import read_model
from gptoss_export.engines.targets import Target
from gptoss_export.engines.tensorrt.header import read_header
from gptoss_export.exporter import cli, pipeline
from gptoss_export.exporter.checkpoint.open import open_checkpoint
from gptoss_export.exporter.commands import polygraphy
from gptoss_export.exporter.errors import GptossExportError
from gptoss_export.exporter.progress import SilentProgress
from gptoss_export.validators import reference_cache

sys.path.insert(0, str(Path(__file__).parent))
try:
    from bad_inputs import CASES, PROBES, USAGE, Bed, Case, make_bed, table
finally:
    sys.path.pop(0)

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return make_bed(tmp_path_factory.mktemp("good"))


@pytest.fixture
def bed(good: Bed, tmp_path: Path) -> Bed:
    shutil.copytree(good.root, tmp_path / "bed")
    return Bed(tmp_path / "bed")


def command(case: Case, bed: Bed) -> list[str]:
    return {
        "export": ["--target", "onnx", "--model", str(bed.model), "--output", str(bed.root / "out")],
        "options": ["--config", str(bed.given)],
        "inspect": ["inspect", str(bed.release)],
        "generate": ["generate", str(bed.release), "--token-ids", "1"],
        "bench": ["bench", str(bed.release)],
        "validate": ["validate", str(bed.release)],
        "prompts": ["validate", str(bed.release), "--prompts", str(bed.prompts)],
        "report": ["report", str(bed.given)],
        "polygraphy": ["polygraphy", "import", str(bed.release), str(bed.given)],
    }[case.command]


def tree(root: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(root))] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what takes long or needs a GPU's package, none of which comes before the reader in question."""
    monkeypatch.setattr(Target, "check_available", lambda self: None)
    monkeypatch.setattr(polygraphy, "open_report", lambda place: None)
    monkeypatch.setattr(polygraphy, "_reference", lambda *_: SimpleNamespace(probes=(), vocab_size=64))


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        assert line.isprintable()
        self.lines.append(line)


def load(bed: Bed, notes: Notes) -> object:
    """The run that lies in the cache, if it is taken."""
    return reference_cache._load(bed.entry, open_checkpoint(bed.model), PROBES, "float32", notes)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(
    case: Case, bed: Bed, quick: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if case.name.startswith("graph:"):
        monkeypatch.setattr(pipeline, "make_yardstick", lambda *_: object())
    case.edit(bed)
    before = tree(bed.root)
    if case.command == "cache":
        notes = Notes()
        assert load(bed, notes) is None
        assert "damaged" in notes.lines[0]
        assert not bed.entry.exists()
        return
    if case.command == "plan":
        with pytest.raises(GptossExportError) as caught:
            read_header(bed.given)
        assert type(caught.value).__name__ == case.error
        return
    monkeypatch.chdir(bed.root)
    code = cli.main(["-q", *command(case, bed)])
    out, err = capfd.readouterr()
    assert code == case.exit_code, err
    assert tree(bed.root) == before
    assert out == ""
    lines = err.splitlines()
    assert all(line.isprintable() for line in lines)
    if case.error == USAGE:
        assert lines[-1].startswith("Error: Invalid value for '--config'")
        return
    # `bench` says first that nothing was compared with the model.
    lines = [line for line in lines if not line.startswith("warning: ")]
    assert len(lines) == 2, err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("  next: ")
    assert "bug in gptoss-export" not in err
    assert len(lines[0]) < 1000 + len(os.fspath(bed.root))


def test_the_good_bed_is_good(bed: Bed, capfd: pytest.CaptureFixture[str]) -> None:
    """Otherwise the cases above would say nothing."""
    assert cli.main(["-q", "inspect", str(bed.release)]) == 0
    dry = ["-q", "--target", "onnx", "--model", str(bed.model), "--output", str(bed.root / "out"), "--dry-run"]
    assert cli.main(dry) == 0
    assert load(bed, Notes()) is not None
    assert read_model(bed.release)


def test_names_are_unique_and_many() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60


def test_the_document_has_this_table() -> None:
    """`python tests/fuzz/bad_inputs.py` prints it."""
    assert table() in DOCUMENT.read_text(encoding="utf-8")
