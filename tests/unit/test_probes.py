"""Probes: their lengths, that they are text where there is a tokenizer, and that they never change."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from gptoss_export.exporter.checkpoint.open import open_checkpoint
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import PromptError, TokenizerError
from gptoss_export.validators.probes import (
    DATA,
    LONG,
    LONGEST,
    LONGEST_LONG,
    SHIPPED_VOCABULARY,
    TEXTS,
    Probe,
    default_probes,
    encode,
    load_tokenizer,
    long_probe,
    shipped_ids,
)
from gptoss_export.validators.texts import long_text


@pytest.fixture(scope="module")
def checkpoint(tiny_dir: Path) -> Checkpoint:
    return open_checkpoint(tiny_dir)


def shaped(checkpoint: Checkpoint, **changes: object) -> Checkpoint:
    """The checkpoint with another config and no tokenizer."""
    return replace(checkpoint, config=replace(checkpoint.config, **changes), side_files=())


def lengths(probes: tuple[Probe, ...]) -> list[int]:
    return [len(probe.ids) for probe in probes]


def gptoss(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the figures of gpt-oss that probes depend on, and no tokenizer."""
    yarn = replace(checkpoint.config.yarn, original_context=4096)
    return shaped(
        checkpoint, vocab_size=SHIPPED_VOCABULARY, sliding_window=128, max_positions=131072, num_experts=32, yarn=yarn
    )


@pytest.mark.parametrize("window", [1, 2, 16, 128, 400])
def test_quick_is_short_and_reaches_beyond_two_windows(checkpoint: Checkpoint, window: int) -> None:
    probes = default_probes(shaped(checkpoint, sliding_window=window), "quick")
    assert len(probes) <= 3
    assert sum(lengths(probes)) <= 2 * window + 64
    assert max(lengths(probes)) > 2 * window


@pytest.mark.parametrize("window", [16, 128])
def test_full_has_every_length_at_the_window(checkpoint: Checkpoint, window: int) -> None:
    found = lengths(default_probes(shaped(checkpoint, sliding_window=window), "full"))
    assert {1, window - 1, window, window + 1} <= set(found)
    assert max(found) > 2 * window
    assert 400 <= sum(found) <= 1500


@pytest.mark.parametrize("effort", ["quick", "full"])
def test_lengths_keep_to_the_context_and_to_memory(checkpoint: Checkpoint, effort: str) -> None:
    assert max(lengths(default_probes(shaped(checkpoint, max_positions=10), effort))) == 10
    huge = shaped(checkpoint, sliding_window=4000, max_positions=131072)
    assert max(lengths(default_probes(huge, effort))) == LONGEST
    assert lengths(default_probes(shaped(checkpoint, max_positions=1), effort)) == [1]


def test_with_a_tokenizer_probes_are_text(checkpoint: Checkpoint) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint.root / "tokenizer.json"))
    probe = next(p for p in default_probes(checkpoint, "full") if p.name == "code-320")
    text = tokenizer.decode(list(probe.ids), skip_special_tokens=False)
    assert text[:80] == TEXTS["code"][:80]


def test_texts_are_several_hundred_tokens_of_several_kinds(checkpoint: Checkpoint) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint.root / "tokenizer.json"))
    assert set(TEXTS) == {"plain", "code", "chat", "scripts"}
    assert all(len(tokenizer.encode(text).ids) > 150 for text in TEXTS.values())


def test_probes_of_one_set_start_differently(checkpoint: Checkpoint) -> None:
    probes = default_probes(checkpoint, "full")
    assert len({probe.ids[:8] for probe in probes[1:5]}) == 4


def test_without_a_tokenizer_ids_are_the_same_on_every_machine(checkpoint: Checkpoint) -> None:
    bare = shaped(checkpoint)
    (_, middle, longest) = default_probes(bare, "quick")
    digest = hashlib.sha256(b"gptoss-export probe 1 token 0").digest()
    assert middle.ids[0] == int.from_bytes(digest[:8], "little") % 2048
    assert default_probes(bare, "quick") == default_probes(bare, "quick")
    assert middle.ids[:20] != longest.ids[:20]
    assert all(0 <= token < 2048 for probe in (middle, longest) for token in probe.ids)


def test_ids_beyond_the_vocabulary_are_left_out(checkpoint: Checkpoint) -> None:
    small = replace(checkpoint, config=replace(checkpoint.config, vocab_size=300))
    assert all(token < 300 for probe in default_probes(small, "full") for token in probe.ids)


def test_a_broken_tokenizer_is_said(checkpoint: Checkpoint, tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.json"
    broken.write_text('{"model": 3}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is no tokenizer"):
        default_probes(replace(checkpoint, side_files=(broken,)), "quick")


def test_ids_of_the_caller_s_own(checkpoint: Checkpoint) -> None:
    probes = default_probes(checkpoint, "quick", heldout_ids=[5, 6, 7])
    assert probes[-1].ids[:7] == (5, 6, 7, 5, 6, 7, 5)


@pytest.mark.parametrize("ids", [[], [2048], [-1]])
def test_ids_that_this_model_cannot_take(checkpoint: Checkpoint, ids: list[int]) -> None:
    with pytest.raises(PromptError, match="vocabulary"):
        default_probes(checkpoint, "quick", heldout_ids=ids)


def test_the_hash_of_a_probe_is_that_of_its_bytes() -> None:
    data = (1).to_bytes(8, "little") + (200000).to_bytes(8, "little")
    assert Probe("a", (1, 200000)).sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", [*TEXTS, LONG])
def test_shipped_ids_are_what_their_files_say_and_of_the_texts_as_they_are(name: str) -> None:
    record = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    text = {**TEXTS, LONG: long_text()}[name]
    assert (record["name"], record["tokenizer"]) == (name, "o200k_harmony")
    assert record["sha256"] == Probe(name, tuple(record["ids"])).sha256
    # If this fails, run benchmarks/make_probes.py: the texts have changed.
    assert record["text_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert shipped_ids(name) == record["ids"]
    assert all(0 <= token < SHIPPED_VOCABULARY for token in record["ids"])
    assert len(record["ids"]) > (4608 if name == LONG else 150)


def test_shipped_chats_hold_harmony_s_special_tokens() -> None:
    """<|return|> 200002, <|constrain|> 200003, <|channel|> 200005, <|start|> 200006, <|end|> 200007, <|message|>
    200008, <|call|> 200012."""
    assert {token for token in shipped_ids("chat") if token >= 199998} == {
        200002, 200003, 200005, 200006, 200007, 200008, 200012,
    }  # fmt: skip
    assert all(token < 199998 for name in TEXTS if name != "chat" for token in shipped_ids(name))


def test_gpt_oss_own_vocabulary_is_probed_with_shipped_ids(checkpoint: Checkpoint, tmp_path: Path) -> None:
    bare = gptoss(checkpoint)
    single, code, longest = default_probes(bare, "quick")
    assert single.ids == (shipped_ids("plain")[0],)
    assert (code.name, code.ids) == ("code-54", tuple(shipped_ids("code")[:54]))
    assert (longest.name, longest.ids) == ("chat-265", tuple(shipped_ids("chat")[:265]))
    broken = tmp_path / "tokenizer.json"
    broken.write_text("no tokenizer, and none is needed")
    assert default_probes(replace(bare, side_files=(broken,)), "quick") == (single, code, longest)
    assert sum(len(set(p.ids)) for p in default_probes(bare, "full")) > 500


def test_the_long_probe_goes_beyond_the_context_that_yarn_stretches(checkpoint: Checkpoint) -> None:
    probe = long_probe(gptoss(checkpoint))
    assert probe is not None
    assert (probe.name, probe.ids) == ("long-4608", tuple(shipped_ids(LONG)[:4608]))

    of_text = long_probe(checkpoint)
    assert of_text is not None
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer is not None
    assert of_text.ids == tuple(tokenizer.encode(long_text()).ids[:576])
    random = long_probe(shaped(checkpoint))
    assert random is not None
    assert (random.name, len(random.ids)) == ("random-576", 576)


def test_there_is_a_long_probe_only_where_it_fits(checkpoint: Checkpoint) -> None:
    assert long_probe(shaped(checkpoint, yarn=None)) is None
    assert long_probe(shaped(checkpoint, max_positions=576)) is not None
    assert long_probe(shaped(checkpoint, max_positions=575)) is None
    most = LONGEST_LONG * 8 // 9
    for context, fits in ((most, True), (most + 2, False)):
        yarn = replace(checkpoint.config.yarn, original_context=context)
        assert (long_probe(shaped(checkpoint, yarn=yarn, max_positions=131072)) is not None) == fits


def test_the_long_text_asks_for_what_was_said_far_above() -> None:
    lines = long_text().splitlines()
    asked = [(i, line) for i, line in enumerate(lines) if line.startswith("Where does ")]
    assert len(asked) > 30
    for i, line in asked:
        who, what = line.removeprefix("Where does ").split("?")[0].split(" keep ", 1)
        (told,) = [k for k, other in enumerate(lines) if f"{who} keeps {what} " in other]
        assert told < i
        assert line.split("? ")[1].rstrip(".").lower() in lines[told].lower()
    assert len(set(lines)) == len(lines)


def test_a_tokenizer_that_fails_is_said() -> None:
    class Failing:
        def encode(self, text: str) -> None:
            raise Exception("no rule for\nthis")  # as the library does

    with pytest.raises(TokenizerError, match="no rule for this"):
        encode(Failing(), "a")  # type: ignore[arg-type]
