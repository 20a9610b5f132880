"""Prompts of the caller's own: what is read, and that whatever else is in the file is a PromptError that says where."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gptoss_export.exporter.checkpoint.open import open_checkpoint
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import PromptError, TokenizerError
from gptoss_export.validators.probes import LONGEST, Probe, load_tokenizer
from gptoss_export.validators.prompts import (
    MAX_BYTES,
    MAX_LINE_BYTES,
    MAX_PROMPTS,
    MAX_TEXT_BYTES,
    decode,
    read_prompts,
)

Read = Callable[[bytes | str], tuple[Probe, ...]]


@pytest.fixture(scope="module")
def checkpoint(tiny_dir: Path) -> Checkpoint:
    return open_checkpoint(tiny_dir)


@pytest.fixture
def read(checkpoint: Checkpoint, tmp_path: Path) -> Read:
    """What a file of JSON lines with this content gives."""

    def read(content: bytes | str) -> tuple[Probe, ...]:
        path = tmp_path / "prompts.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_prompts(path, checkpoint)

    return read


def ids_of(checkpoint: Checkpoint, text: str) -> tuple[int, ...]:
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer is not None
    return tuple(tokenizer.encode(text).ids)


def test_a_text_file_is_one_prompt_as_it_stands(checkpoint: Checkpoint, tmp_path: Path) -> None:
    text = "  Zwei Möwen stritten.\n\nAnd so on.\r\n"
    path = tmp_path / "gulls.txt"
    path.write_bytes(text.encode())
    (probe,) = read_prompts(path, checkpoint)
    assert probe == Probe("gulls", ids_of(checkpoint, text))
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_prompts(path, checkpoint) == (probe,)


def test_lines_are_texts_or_ids(checkpoint: Checkpoint, read: Read) -> None:
    content = '{"text": "The ferry", "name": "ferry"}\r\n\n{"ids": [5, 2047]}\n  [0, 1, 1]'
    assert read(content) == (
        Probe("ferry", ids_of(checkpoint, "The ferry")),
        Probe("line-3", (5, 2047)),
        Probe("line-4", (0, 1, 1)),
    )


def test_a_file_s_name_ends_in_jsonl_in_any_case(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "A.JSONL"
    path.write_text("[7]\n")
    assert read_prompts(path, checkpoint) == (Probe("line-1", (7,)),)


def test_special_tokens_are_recognised(checkpoint: Checkpoint, read: Read) -> None:
    (probe,) = read('{"text": "<|start|>user<|message|>"}')
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer is not None
    assert {probe.ids[0], probe.ids[-1]} == {tokenizer.token_to_id("<|start|>"), tokenizer.token_to_id("<|message|>")}


def test_a_file_name_that_is_no_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for stem in ("a\nb", "x" * 81):
        path = tmp_path / f"{stem}.txt"
        path.write_text("gulls")
        assert read_prompts(path, checkpoint)[0].name == "prompt"


LONG_IDS = json.dumps([1] * (LONGEST + 1))

REFUSED = {
    "": "line 1: no prompt",
    "\n \n": "line 1: no prompt",
    "[]": "line 1: no tokens",
    '{"ids": []}': "no tokens",
    '{"text": ""}': "no tokens",
    "[1]\n\n[2048]": r"line 3: the token id 2048 is outside of the vocabulary of 2048",
    "[-1]": "token id -1",
    "[1.0]": "ids holds 1.0",
    "[true]": "ids holds True",
    "[null]": "ids holds None",
    "[[1]]": "ids holds a list of 1",
    "[1, NaN]": "NaN is not JSON",
    '{"ids": [1], "x": -Infinity}': "-Infinity is not JSON",
    "[1e999]": "the number '1e999' is out of range",
    "[" + "9" * 5000 + "]": "an integer of 5000 digits",
    "[" * 100_000: "nested too deeply",
    '{"ids": [1], "ids": [2]}': "the key 'ids' is given twice",
    '{"ids": {"a": 1, "a": 1}}': "the key 'a' is given twice",
    '{"ids": 3}': "ids is 3, not a list",
    '{"ids": {}}': "ids is an object",
    '{"text": 3}': "text is 3",
    '{"text": ["a"]}': "text is a list of 1",
    '{"text": "a", "ids": [1]}': "either text or ids",
    '{"name": "a"}': "either text or ids",
    '{"text": "a", "weight": 2}': "the key 'weight'",
    '{"text": "\\ud800"}': "a lone surrogate",
    '{"ids": [1], "name": ""}': "the name is not",
    '{"ids": [1], "name": 7}': "the name is not",
    '{"ids": [1], "name": null}': "the name is not",
    '{"ids": [1], "name": "a\\u001b[2J"}': "the name is not",
    '{"ids": [1], "name": "\\ud800"}': "a lone surrogate",
    '{"ids": [1], "name": "' + "x" * 81 + '"}': "the name is not",
    '{"ids": [1], "name": "a"}\n{"ids": [2], "name": "a"}': "line 2: the name 'a' is given twice",
    '{"ids": [1], "name": "line-2"}\n[2]': "line 2: the name 'line-2' is given twice",
    '"text"': "neither an object nor a list",
    "3": "neither an object nor a list",
    "null": "neither an object nor a list",
    "[1] [2]": "not JSON: Extra data at column 5",
    "hello": "not JSON",
    LONG_IDS: f"{LONGEST + 1} tokens, more than the {LONGEST}",
    '{"text": "' + "word " * (LONGEST + 1) + '"}': "tokens, more than",
    '{"text": "' + "x" * (MAX_TEXT_BYTES + 1) + '"}': "bytes of text, which cannot be as few",
    "[1]\n" * (MAX_PROMPTS + 1): f"line {MAX_PROMPTS + 1}: more than {MAX_PROMPTS} prompts",
    "[1]\n" + " " * 9 + "[" + "1" * MAX_LINE_BYTES + "]": "line 2: more than",
}


@pytest.mark.parametrize("content", REFUSED, ids=lambda content: repr(content[:24]))
def test_what_is_refused_and_where(read: Read, content: str) -> None:
    with pytest.raises(PromptError, match=REFUSED[content]) as caught:
        read(content)
    assert "prompts.jsonl: line " in caught.value.what
    assert "\n" not in caught.value.what
    assert len(caught.value.what) < 400 + len(str(Path.cwd()))


def test_bytes_that_are_no_utf8_are_named_by_line(read: Read, checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="line 2: not UTF-8"):
        read(b'[1]\n{"text": "\xff"}')
    text = tmp_path / "a.txt"
    text.write_bytes(b"one\ntwo\nthr\xffee\n")
    with pytest.raises(PromptError, match="line 3: not UTF-8"):
        read_prompts(text, checkpoint)


def test_the_context_of_the_model_is_a_limit_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[1, 2, 3]")
    short = replace(checkpoint, config=replace(checkpoint.config, max_positions=2))
    with pytest.raises(PromptError, match="3 tokens, more than the 2"):
        read_prompts(path, short)


def test_as_many_and_as_long_as_allowed(read: Read) -> None:
    probes = read(f"{json.dumps([2047] * LONGEST)}\n" * MAX_PROMPTS)
    assert [len(probe.ids) for probe in probes] == [LONGEST] * MAX_PROMPTS


def test_text_without_a_tokenizer(checkpoint: Checkpoint, tmp_path: Path) -> None:
    bare = replace(checkpoint, side_files=())
    path = tmp_path / "a.jsonl"
    path.write_text('[1]\n{"text": "a"}')
    with pytest.raises(PromptError, match=r"line 2: text, and the checkpoint has no tokenizer") as caught:
        read_prompts(path, bare)
    assert "ids" in caught.value.next_step
    path.write_text("[1]")
    assert read_prompts(path, bare) == (Probe("line-1", (1,)),)


def test_a_tokenizer_of_another_vocabulary(checkpoint: Checkpoint, tmp_path: Path) -> None:
    small = replace(checkpoint, config=replace(checkpoint.config, vocab_size=20))
    path = tmp_path / "a.txt"
    path.write_text("The ferry leaves.")
    with pytest.raises(PromptError, match="outside of the vocabulary of 20"):
        read_prompts(path, small)


def test_files_that_are_none(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="does not exist"):
        read_prompts(tmp_path / "absent.jsonl", checkpoint)
    with pytest.raises(PromptError, match="a folder"):
        read_prompts(tmp_path, checkpoint)
    fifo = tmp_path / "fifo.jsonl"
    os.mkfifo(fifo)
    with pytest.raises(PromptError, match="a FIFO"):
        read_prompts(fifo, checkpoint)
    large = tmp_path / "large.txt"
    with large.open("wb") as f:
        f.truncate(MAX_BYTES + 1)
    with pytest.raises(PromptError, match=f"more than {MAX_BYTES} bytes"):
        read_prompts(large, checkpoint)


SCALARS = st.none() | st.booleans() | st.integers(-3, 3000) | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=4), v, max_size=3))
LINES = st.one_of(
    st.binary(max_size=60),
    VALUES.map(lambda v: json.dumps(v).encode()),
    st.lists(st.integers(0, 2050) | SCALARS, max_size=5).map(lambda v: json.dumps(v).encode()),
    st.fixed_dictionaries({}, optional={"text": VALUES, "ids": VALUES, "name": VALUES}).map(
        lambda v: json.dumps(v, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ),
    st.just(b"[5]"),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(st.lists(LINES, max_size=4).map(b"\n".join), st.sampled_from(["p.jsonl", "p.txt"]))
@example(b"", "p.txt")
@example(b"\x00", "p.txt")
def test_any_file_gives_probes_that_this_model_can_take_or_a_prompt_error(
    checkpoint: Checkpoint, tmp_path: Path, content: bytes, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    try:
        probes = read_prompts(path, checkpoint)
    except PromptError as error:
        assert f"{name}: line " in error.what
        return
    assert 1 <= len({probe.name for probe in probes}) == len(probes) <= MAX_PROMPTS
    for probe in probes:
        assert 1 <= len(probe.ids) <= LONGEST
        assert all(type(token) is int and 0 <= token < 2048 for token in probe.ids)
        assert len(probe.sha256) == 64


def test_decode_says_what_encode_was_given(checkpoint: Checkpoint) -> None:
    say = decode(checkpoint)
    assert say is not None
    text = "<|start|>user<|message|>Zwei Möwen 🙂"
    ids = ids_of(checkpoint, text)
    assert say(ids) == text
    assert "\ufffd" in say(ids[:-1])
    assert say([]) == say([2**31]) == ""


def test_decode_without_a_tokenizer_and_with_a_broken_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert decode(replace(checkpoint, side_files=())) is None
    broken = tmp_path / "tokenizer.json"
    broken.write_text("[]")
    with pytest.raises(TokenizerError, match="no tokenizer"):
        decode(replace(checkpoint, side_files=(broken,)))
