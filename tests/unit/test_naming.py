"""What a checkpoint is called: by the user, by the Hub's cache, and in every paper of an artifact; hostile names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import pytest

from gptoss_export.exporter import cli, pipeline
from gptoss_export.exporter.artifact import MANIFEST_NAME, PROVENANCE_NAME, SBOM_NAME, read_manifest
from gptoss_export.exporter.checkpoint.open import open_checkpoint
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import ManifestError, NotValidatedError
from gptoss_export.exporter.origin import LONGEST_TEXT, MOST_LABELS, ModelName
from gptoss_export.exporter.output.identity import export_key
from gptoss_export.exporter.planning.plan import make_plan
from gptoss_export.exporter.planning.request import ExportRequest
from gptoss_export.exporter.trust.attest import attestations
from gptoss_export.exporter.trust.origin_of import origin_of
from gptoss_export.exporter.trust.provenance import make_provenance
from gptoss_export.exporter.trust.verify import verify_artifact
from gptoss_export.validators.report import from_json, to_html, to_json, to_junit, to_markdown
from gptoss_export.validators.report.schema import ParityReport

SCHEMA_FILE = Path(__file__).parents[2] / "docs" / "parity.schema.json"
EXPORT = ["--target", "onnx", "--model", "m", "--output", "out"]
COMMIT = "6cee5e81ee83917806bbde320786a8fb61efebee"
FULL = ModelName(
    "support-bot", "openai/gpt-oss-20b", COMMIT, "original", {"team": "ml", "example.com/stage": "release 3 = final"}
)
# Nobody can write these anywhere.
REFUSED = {
    "empty": "",
    "blank": "   ",
    "space before": " name",
    "line end": "a\nb",
    "line end behind": "name\n",
    "escape": "\x1b[31mred",
    "NUL": "a\x00b",
    "right-to-left override": "gpt\u202etxt.exe",
    "isolate": "a\u2066b",
    "zero-width space": "a\u200bb",
    "line separator": "a\u2028b",
    "no-break space": "a\u00a0b",
    "half a surrogate pair": "a\ud800b",
    "10 kB": "x" * 10_000,
    "one too long": "x" * (LONGEST_TEXT + 1),
}
# These are names, and must be shown as they are, and do nothing.
SHOWN = {
    "table": "a | b || c",
    "markup": "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "end of CDATA": "]]> --> </property></testsuite>",
    "Markdown": "# **PASS** `x` [l](http://x) ~~y~~ &lt;b&gt; \\ _z_",
    "quotes": "\"'` onmouseover='x' \"",
    "entity": "&amp; &#8238; %00",
    "other scripts": "модель 模型 ñ",
    "longest": "| " * (LONGEST_TEXT // 2 - 1) + "xy",
}


def named(delivered: Any, model: ModelName) -> tuple[Any, ParityReport]:
    """Manifest and report of an artifact of this model."""
    manifest = replace(delivered.manifest, origin=replace(delivered.manifest.origin, model=model))
    return manifest, replace(delivered.report, binding=replace(delivered.report.binding, model=model))


# By the user


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[ExportRequest]:
    seen: list[ExportRequest] = []
    monkeypatch.setattr(pipeline, "export", lambda request, progress: seen.append(request) or [])
    for name in ("NAME", "LABEL"):
        monkeypatch.delenv(f"GPTOSS_EXPORT_{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    return seen


def test_name_and_labels_from_line_environment_and_file(
    requests: list[ExportRequest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text("name: of the file\nlabel: [team=ml, note=two words = one value]\n")
    assert cli.main(EXPORT) == 0
    assert cli.main([*EXPORT, "--config", "c.yaml"]) == 0
    monkeypatch.setenv("GPTOSS_EXPORT_NAME", "of the environment")
    monkeypatch.setenv("GPTOSS_EXPORT_LABEL", "team=ops stage=test")
    assert cli.main([*EXPORT, "--config", "c.yaml"]) == 0
    assert (
        cli.main([*EXPORT, "--config", "c.yaml", "--name", "of the line", "--label", "a=b=c", "--label", "d=e f"]) == 0
    )
    assert [request.called for request in requests] == [
        ModelName(),
        ModelName("of the file", labels={"team": "ml", "note": "two words = one value"}),
        ModelName("of the environment", labels={"team": "ops", "stage": "test"}),
        ModelName("of the line", labels={"a": "b=c", "d": "e f"}),
    ]


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("option", ["--name", "--label"])
def test_a_hostile_text_is_one_clear_line(
    option: str, kind: str, requests: list[ExportRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    text = REFUSED[kind]
    assert cli.main([*EXPORT, option, text if option == "--name" else f"key={text}"]) == 2
    error = capsys.readouterr().err
    message = error.splitlines()[-1]
    assert f"Invalid value for '{option}'" in message and "one line of 1 to 160 printable characters" in message
    assert message.isprintable() and len(message) < 400
    assert not requests


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["team"], "'team' is no label: it takes KEY=VALUE"),
        (["=ml"], "the key of a label has"),
        (["te am=ml"], "the key of a label has"),
        (["-team=ml"], "the key of a label has"),
        (["t\u202eam=ml"], "the key of a label has"),
        (["team\n=ml"], "the key of a label has"),
        (["t" * 64 + "=ml"], "the key of a label has"),
        (["<b>=ml"], "the key of a label has"),
        (["team=ml", "team=ops"], "'team' is given twice"),
        (["team=ml", "team=ml"], "'team' is given twice"),
        ([f"k{n}=v" for n in range(MOST_LABELS + 1)], "33 labels are more than 32"),
    ],
)
def test_malformed_labels(
    labels: list[str], message: str, requests: list[ExportRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*EXPORT, *(part for label in labels for part in ("--label", label))]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line and line.isprintable()
    assert not requests


def test_the_environment_is_no_way_around(
    requests: list[ExportRequest], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPTOSS_EXPORT_NAME", "a\u202eb")
    assert cli.main(EXPORT) == 2
    monkeypatch.delenv("GPTOSS_EXPORT_NAME")
    monkeypatch.setenv("GPTOSS_EXPORT_LABEL", "owner=Jane Doe")
    assert cli.main(EXPORT) == 2
    assert "'Doe' is no label" in capsys.readouterr().err
    assert not requests


@pytest.mark.parametrize("text", SHOWN.values(), ids=SHOWN)
def test_any_other_text_is_a_name(text: str, requests: list[ExportRequest]) -> None:
    assert cli.main([*EXPORT, "--name", text, "--label", f"key={text}"]) == 0
    assert requests[0].called == ModelName(text, labels={"key": text})


def test_the_name_is_part_of_the_work_and_of_its_hash(tiny_dir: Path, tmp_path: Path, delivered: Any) -> None:
    plan = make_plan(ExportRequest(str(tiny_dir), tmp_path / "out", ("onnx",)))
    names = (ModelName(), ModelName("a"), ModelName("b"), ModelName("a", labels={"k": "v"}))
    assert len({export_key(replace(plan, request=replace(plan.request, called=name))) for name in names}) == len(names)
    assert len({named(delivered, name)[0].content_sha256 for name in names}) == len(names)


# By the Hub's cache


@pytest.fixture
def snapshot(tmp_path: Path, tiny_dir: Path) -> Path:
    """The small checkpoint as `huggingface_hub` keeps it, and once more below original/."""
    repository = tmp_path / "hub" / "models--some-one--tiny.model_1"
    folder = repository / "snapshots" / COMMIT
    (folder / "original").mkdir(parents=True)
    (repository / "blobs").mkdir()
    for n, file in enumerate(sorted(tiny_dir.iterdir())):
        shutil.copyfile(file, repository / "blobs" / str(n))
        (folder / file.name).symlink_to(f"../../blobs/{n}")
        (folder / "original" / file.name).symlink_to(f"../../../blobs/{n}")
    return folder


def model_of(folder: Path, model: str = "", **options: Any) -> ModelName:
    request = ExportRequest(model or str(folder), Path("out"), ("onnx",), parity="off", **options)
    return origin_of(request, "onnx", open_checkpoint(folder)).model


def test_a_snapshot_is_the_same_by_path_link_and_id(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ModelName(None, "some-one/tiny.model_1", COMMIT)
    (tmp_path / "link").symlink_to(snapshot)
    monkeypatch.chdir(snapshot)
    for folder in (snapshot, tmp_path / "link", Path()):
        assert model_of(folder) == expected
    assert model_of(snapshot, "some-one/tiny.model_1", revision="main") == expected
    called = ModelName("support-bot", labels={"team": "ml"})
    assert model_of(snapshot, called=called) == replace(expected, name="support-bot", labels={"team": "ml"})


def test_original_below_a_snapshot(snapshot: Path, delivered: Any) -> None:
    model = model_of(snapshot / "original")
    assert model == ModelName(None, "some-one/tiny.model_1", COMMIT, "original")
    for path in snapshot.glob("model*"):
        path.unlink()
    assert open_checkpoint(snapshot).root == snapshot / "original"
    assert model_of(snapshot) == model
    assert model.source == f"some-one/tiny.model_1/original at {COMMIT}"
    statement = json.loads(make_provenance(named(delivered, model)[0]))
    needed = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    purl = f"pkg:huggingface/some-one/tiny.model_1@{COMMIT}"
    uris = {entry["name"]: entry["uri"] for entry in needed}
    assert uris["config.json"] == f"{purl}#original/config.json"
    assert uris["tokenizer.json"] == purl


@pytest.mark.parametrize(
    "place",
    [
        "snapshots/{commit}",
        "models--some-one--tiny/{commit}",
        "models--some-one--tiny/snapshots/main",
        "models--some-one--tiny/snapshots/{commit}/mine",
        "models--some-one--tiny/snapshots/{commit}/original/original",
        "models--tiny/snapshots/{commit}",
        "models--a--b--c/snapshots/{commit}",
        "models----tiny/snapshots/{commit}",
        "models--some one--tiny/snapshots/{commit}",
        "models--..--tiny/snapshots/{commit}",
        "models--a\u202e--tiny/snapshots/{commit}",
        "datasets--some-one--tiny/snapshots/{commit}",
        "my-model",
    ],
)
def test_other_folders_have_no_name(place: str, tiny: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / place.format(commit=COMMIT)
    folder.mkdir(parents=True)
    request = ExportRequest("openai/gpt-oss-20b", tmp_path / "out", ("onnx",), parity="off")
    assert origin_of(request, "onnx", replace(tiny, root=folder)).model == ModelName()


def test_what_a_checkpoint_says_of_itself_is_no_name(tiny: Checkpoint, tmp_path: Path) -> None:
    claims = replace(tiny, raw_config={**tiny.raw_config, "_name_or_path": "openai/gpt-oss-120b", "name": "x"})
    request = ExportRequest(str(tiny.root), tmp_path / "out", ("onnx",), parity="off")
    assert origin_of(request, "onnx", claims).model == ModelName()


# In manifests and reports that somebody else wrote


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("place", [("name",), ("labels", "key"), ("repository",), ("revision",)], ids="-".join)
def test_a_hostile_text_is_in_no_manifest_and_no_report(place: tuple[str, ...], kind: str, delivered: Any) -> None:
    raw = asdict(FULL)
    node = raw if len(place) == 1 else raw[place[0]]
    node[place[-1]] = REFUSED[kind]
    refuse_both(raw, delivered)


@pytest.mark.parametrize(
    "change",
    [
        {"repository": None},
        {"repository": "../x"},
        {"revision": None},
        {"revision": "main"},
        {"subfolder": "metal"},
        {"repository": None, "revision": None},
        {"name": 7},
        {"name": ["x"]},
        {"labels": None},
        {"labels": {"a b": "c"}},
        {"labels": {"": "c"}},
        {"labels": {"a": 1}},
        {"labels": {f"k{n}": "v" for n in range(MOST_LABELS + 1)}},
        {"more": 1},
    ],
    ids=lambda change: ",".join(change),
)
def test_names_that_none_wrote_are_refused(change: dict[str, Any], delivered: Any) -> None:
    refuse_both(asdict(FULL) | change, delivered)


def refuse_both(model: dict[str, Any], delivered: Any) -> None:
    path = delivered.folder / MANIFEST_NAME
    raw = json.loads(path.read_bytes())
    raw["origin"]["model"] = model
    path.write_text(json.dumps(raw))
    with pytest.raises(ManifestError, match=r"origin in the manifest|lone surrogate") as manifest_error:
        read_manifest(delivered.folder)
    report = json.loads(to_json(delivered.report))
    report["binding"]["model"] = model
    with pytest.raises(NotValidatedError, match="cannot be read") as report_error:
        from_json(json.dumps(report))
    for error in (manifest_error.value, report_error.value):
        assert error.what.isprintable() and len(error.what) < 500


# In every paper


def test_all_papers_of_an_artifact_have_all_of_it(delivered: Any, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, report = named(delivered, FULL)
    assert from_json(to_json(report)).binding.model == FULL
    jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text())).validate(json.loads(to_json(report)))
    papers = attestations(manifest, report)
    parameters = json.loads(papers[PROVENANCE_NAME])["predicate"]["buildDefinition"]["externalParameters"]
    assert parameters["model"] == asdict(FULL)
    component = json.loads(papers[SBOM_NAME])["metadata"]["component"]
    assert component["name"] == "support-bot (ort-cpu)"
    assert {p["name"]: p["value"] for p in component["properties"]} == {
        f"gptoss-export:label:{key}": value for key, value in FULL.labels.items()
    }
    (ancestor,) = component["pedigree"]["ancestors"]
    assert (ancestor["name"], ancestor["version"]) == ("openai/gpt-oss-20b", COMMIT)
    assert ancestor["purl"] == f"pkg:huggingface/openai/gpt-oss-20b@{COMMIT}#original"
    properties = {p.get("name"): p.get("value") for p in ET.fromstring(to_junit(report)).iter("property")}
    assert {f"model {what}": text for what, text in FULL.facts}.items() <= properties.items()
    assert len(FULL.facts) == 6
    sentence = f"The model: support-bot, from openai/gpt-oss-20b/original at {COMMIT}."
    assert to_markdown(report).split("\n\n")[1] == sentence
    assert f"<p>{sentence}</p>" in to_html(report)
    assert "<title>PASS: parity of ort-cpu, support-bot</title>" in to_html(report)


def test_a_model_without_a_name_has_no_sentence(delivered: Any) -> None:
    _, report = named(delivered, ModelName())
    for text in (to_markdown(report), to_html(report)):
        assert "The model:" not in text and "model name" not in text
    assert "model " not in {(p.get("name") or "")[:6] for p in ET.fromstring(to_junit(report)).iter("property")}


def test_inspect_shows_it(delivered_as: Callable[[ModelName], Any], capsys: pytest.CaptureFixture[str]) -> None:
    artifact = delivered_as(FULL)
    verify_artifact(artifact.folder)
    assert cli.main(["inspect", str(artifact.folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.split()[0] in ("name", "from", "label")] == [
        "name     support-bot",
        f"from     openai/gpt-oss-20b/original at {COMMIT}",
        "label    example.com/stage=release 3 = final",
        "label    team=ml",
    ]
    assert cli.main(["inspect", str(artifact.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["origin"]["model"] == asdict(FULL)


class Text(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("text", SHOWN.values(), ids=SHOWN)
def test_a_name_is_shown_as_it_is_and_does_nothing(text: str, delivered: Any) -> None:
    from markdown_it import MarkdownIt

    model = ModelName(text, labels={"key": text})
    (_, plain), (manifest, report) = named(delivered, ModelName("x", labels={"key": "y"})), named(delivered, model)
    assert from_json(to_json(report)) == report
    page, before = Text(to_html(report)), Text(to_html(plain))
    assert page.tags == before.tags
    assert page.text.count(text) == 4  # title, banner and two rows
    rendered = MarkdownIt("gfm-like", {"linkify": False}).render(to_markdown(report))
    shown = Text(rendered)
    assert shown.tags == Text(MarkdownIt("gfm-like", {"linkify": False}).render(to_markdown(plain))).tags
    assert shown.text.count(text) == 3
    values = [p.get("value") for p in ET.fromstring(to_junit(report)).iter("property")]
    assert values.count(text) == 2
    papers = attestations(manifest, report)
    assert json.loads(papers[SBOM_NAME])["metadata"]["component"]["name"] == f"{text} (ort-cpu)"
    assert (
        json.loads(papers[PROVENANCE_NAME])["predicate"]["buildDefinition"]["externalParameters"]["model"]["name"]
        == text
    )


@pytest.mark.parametrize("text", SHOWN.values(), ids=SHOWN)
def test_the_bill_stays_valid(text: str, delivered: Any) -> None:
    pytest.importorskip("cyclonedx", reason="cyclonedx-python-lib is not installed")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    labels = {f"key{n}": text for n in range(MOST_LABELS)}
    for model in (ModelName(text, labels=labels), replace(FULL, name=text)):
        bill = attestations(*named(delivered, model))[SBOM_NAME]
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill.decode()) is None
