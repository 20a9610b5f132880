"""Generation: the settings mean what they say, and text comes out in whole characters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from gptoss_export.engines import generate as module
from gptoss_export.engines.generate import generate, sample
from gptoss_export.engines.runner import KVCache, Step, Tokens
from gptoss_export.exporter.commands.generate import encode, load_tokenizer, stream
from gptoss_export.exporter.errors import PromptError, SessionError, TokenizerError

VOCAB = 50


@dataclass
class Cache:
    length: int


class Counter:
    """A runner whose most likely next token is the last one plus one; it remembers how it was called."""

    vocab_size = VOCAB

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], int]] = []

    def forward(
        self, input_ids: Tokens, attention_mask: Tokens | None = None, cache: KVCache | None = None, keep: int = 1
    ) -> Step:
        assert attention_mask is None
        past = 0 if cache is None else cache.length
        self.calls.append((input_ids[0].tolist(), past))
        logits = np.zeros((1, keep, VOCAB), np.float32)
        logits[0, -1, (input_ids[0, -1] + 1) % VOCAB] = 5.0
        return Step(logits, Cache(past + input_ids.shape[1]))


def test_greedy_goes_on_with_one_token_at_a_time() -> None:
    runner = Counter()
    assert list(generate(runner, [3, 4, 5], max_new_tokens=3)) == [6, 7, 8]
    assert runner.calls == [([3, 4, 5], 0), ([6], 3), ([7], 4)]


def test_prefill_is_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PREFILL_CHUNK", 4)
    runner = Counter()
    assert list(generate(runner, range(10), max_new_tokens=1)) == [10]
    assert runner.calls == [([0, 1, 2, 3], 0), ([4, 5, 6, 7], 4), ([8, 9], 8)]


def test_stops_before_an_eos_id() -> None:
    assert list(generate(Counter(), [0], max_new_tokens=10, eos_token_ids=(7, 4))) == [1, 2, 3]


def test_nothing_to_make_runs_nothing() -> None:
    runner = Counter()
    assert list(generate(runner, [0], max_new_tokens=0)) == []
    assert runner.calls == []


def test_tokens_come_as_they_are_made() -> None:
    runner = Counter()
    tokens = generate(runner, [0], max_new_tokens=5)
    next(tokens)
    assert len(runner.calls) == 1


def test_sampling_is_reproducible_and_depends_on_the_seed() -> None:
    def draw(seed: int) -> list[int]:
        return list(generate(Counter(), [0], max_new_tokens=30, temperature=3.0, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-30}])
def test_settings_that_leave_only_the_likeliest(settings: dict[str, float]) -> None:
    tokens = generate(Counter(), [0], max_new_tokens=5, **({"temperature": 2.0} | settings))  # type: ignore[arg-type]
    assert list(tokens) == [1, 2, 3, 4, 5]


def test_sampling_follows_the_distribution() -> None:
    probabilities = np.array([0.1, 0.5, 0.15, 0.25])
    rng = np.random.default_rng(0)
    logits = np.log(probabilities).astype(np.float32)

    def share(n: int = 4000, **settings: float) -> np.ndarray:  # type: ignore[type-arg]
        drawn = [
            sample(logits, rng=rng, **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings)) for _ in range(n)
        ]  # type: ignore[arg-type]
        return np.bincount(drawn, minlength=4) / n

    assert np.allclose(share(), probabilities, atol=0.03)
    assert np.allclose(share(top_k=2), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    # 0.5 + 0.25 is the smallest set that has at least 0.6; 0.76 needs the third as well.
    assert np.allclose(share(top_p=0.6), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    assert np.allclose(share(top_p=0.76), np.array([0, 0.5, 0.15, 0.25]) / 0.9, atol=0.03)
    assert np.allclose(share(temperature=0.5), probabilities**2 / (probabilities**2).sum(), atol=0.03)


def test_equal_logits_take_the_lowest_id() -> None:
    assert sample(np.zeros(9, np.float32), 0.0, 0, 1.0, np.random.default_rng(0)) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(bad: float) -> None:
    logits = np.zeros(9, np.float32)
    logits[3] = bad
    with pytest.raises(SessionError, match="finite"):
        sample(logits, 0.0, 0, 1.0, np.random.default_rng(0))


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt_ids": []},
        {"prompt_ids": [VOCAB]},
        {"prompt_ids": [-1]},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"max_new_tokens": -1},
    ],
)
def test_settings_out_of_range_are_refused_at_once(settings: dict[str, object]) -> None:
    runner = Counter()
    arguments = {"prompt_ids": [1], "max_new_tokens": 3} | settings
    with pytest.raises(PromptError):
        generate(runner, **arguments)  # type: ignore[arg-type]
    assert runner.calls == []


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """One token a byte, so that every character beyond ASCII is spread over several."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


TEXT = "naïve 東京 🚢 done"


def test_characters_of_several_tokens_come_out_whole(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode(TEXT).ids
    assert len(ids) > len(TEXT)
    written: list[str] = []
    stream(iter(ids), byte_tokenizer, byte_tokenizer.encode("So ").ids, written.append)
    assert "".join(written) == TEXT
    assert "\ufffd" not in "".join(written)
    assert len(written) == len(TEXT)


def test_a_character_that_was_cut_off_is_not_written(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("ok 🚢").ids[:-1]
    written: list[str] = []
    stream(iter(ids), byte_tokenizer, [], written.append)
    assert "".join(written) == "ok "


def test_text_is_written_before_the_next_token_is_asked_for(byte_tokenizer: Tokenizer) -> None:
    written: list[str] = []

    def tokens() -> Iterator[int]:
        for count, token in enumerate(byte_tokenizer.encode("abc").ids):
            assert len(written) == count
            yield token

    stream(tokens(), byte_tokenizer, [], written.append)
    assert written == ["a", "b", "c"]


def test_ids_without_a_tokenizer() -> None:
    written: list[str] = []
    stream(iter([5, 6, 7]), None, [1], written.append)
    assert "".join(written) == "5 6 7"


def test_tokenizer_files(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        encode(None, tmp_path, "text")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="is no tokenizer"):
        load_tokenizer(tmp_path)
    byte_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert encode(load_tokenizer(tmp_path), tmp_path, "ab") == byte_tokenizer.encode("ab").ids


def test_a_prompt_that_is_no_text(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="not valid text"):
        encode(byte_tokenizer, tmp_path, "\udcff")
