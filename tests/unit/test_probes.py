"""Probes: their lengths, that they are text where there is a tokenizer, and that they never change."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from gptoss_export.exporter.checkpoint.open import open_checkpoint
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import PromptError, TokenizerError
from gptoss_export.validators.probes import LONGEST, TEXTS, Probe, default_probes


@pytest.fixture(scope="module")
def checkpoint(tiny_dir: Path) -> Checkpoint:
    return open_checkpoint(tiny_dir)


def shaped(checkpoint: Checkpoint, **changes: int) -> Checkpoint:
    """The checkpoint with another config and no tokenizer."""
    return replace(checkpoint, config=replace(checkpoint.config, **changes), side_files=())


def lengths(probes: tuple[Probe, ...]) -> list[int]:
    return [len(probe.ids) for probe in probes]


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
