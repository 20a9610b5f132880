"""Typed access to an untrusted config: the right type and range, or an error that names the field."""

from __future__ import annotations

from collections.abc import Mapping

from gptoss_export.exporter.checkpoint.files import shown
from gptoss_export.exporter.errors import AbsurdSizeError, ConfigError


class Fields:
    """One JSON object of a config. `where` names it in messages (`config.json`, `config.json: rope_scaling`).

    A JSON null counts as absent, as in transformers. Booleans are never numbers.
    """

    def __init__(self, raw: Mapping[str, object], where: str) -> None:
        self.raw = raw
        self.where = where

    def has(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.where}: {problem}", "Correct the file, or take the one that came with the weights.")

    def integer(self, key: str, high: int, low: int = 1) -> int:
        """An integer of at least `low`; above `high` it is an AbsurdSizeError, else a ConfigError."""
        value = self._required(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"{key} is {shown(value)}, not an integer")
        if value < low:
            raise self.error(f"{key} is {value}, less than {low}")
        if value > high:
            raise AbsurdSizeError(
                f"{self.where}: {key} is {value}, more than the {high} that any gpt-oss could have",
                "Correct the file, or take the one that came with the weights.",
            )
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A number, low < number <= high."""
        value = default if default is not None and not self.has(key) else self._required(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{key} is {shown(value)}, not a number")
        if not low < value <= high:
            raise self.error(f"{key} is {value}, not above {low:g} and up to {high:g}")
        return float(value)

    def flag(self, key: str) -> bool | None:
        """True, False, or None when absent."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{key} is {shown(value)}, not true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = default if default is not None and not self.has(key) else self._required(key)
        if not isinstance(value, str):
            raise self.error(f"{key} is {shown(value)}, not a string")
        return value

    def table(self, key: str) -> Fields | None:
        """The object under `key`, or None when it is absent or empty (transformers treats both alike)."""
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(f"{key} is {shown(value)}, not an object")
        return Fields(value, f"{self.where}: {key}") if value else None

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One token id or a list of them, each inside the vocabulary; empty when absent."""
        value = self.raw.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int):
                raise self.error(f"{key} holds {shown(token)}, not a token id")
            if not 0 <= token < vocab_size:
                raise self.error(f"{key} holds {token}, outside the vocabulary of {vocab_size}")
        return tuple(dict.fromkeys(ids))

    def _required(self, key: str) -> object:
        value = self.raw.get(key)
        if value is None:
            raise self.error(f"{key} is missing")
        return value
