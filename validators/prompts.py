"""Probes of the caller's own, out of a file; and what tokens say, for the report.

    read_prompts(Path("letter.txt"), checkpoint)       # one probe, the whole file as it stands
    read_prompts(Path("prompts.jsonl"), checkpoint)    # one probe a line

A file whose name ends in .jsonl holds a JSON value a line, blank lines aside:

    {"text": "The capital of France is", "name": "paris"}    through the checkpoint's tokenizer
    {"ids": [976, 9029, 328, 10128, 382]}                    as they are; called line-2
    [976, 9029, 328]                                         the same, bare

Special tokens in a text (<|start|>) are recognised as such, so that Harmony-formatted chats can be written down.
A prompt that is too long is refused, not cut: what was measured is what is in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gptoss_export.exporter.checkpoint.files import open_regular, read_capped, shown
from gptoss_export.exporter.checkpoint.json_reader import parse_json
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import CheckpointError, PromptError
from gptoss_export.validators.probes import LONGEST, Probe, encode, load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_BYTES = 16 << 20
MAX_PROMPTS = 256
MAX_TEXT_BYTES = 64 * LONGEST
"""Nothing that anybody writes has more bytes than this in LONGEST tokens; longer texts need not be tokenised."""

MAX_LINE_BYTES = 1 << 20
"""The longest text with every character escaped has less; it bounds what parsing a line can take."""

MAX_NAME = 80
NEXT_STEP = 'Correct the file: plain text, or .jsonl with {"text": ...} or {"ids": [...]} in each line.'


def read_prompts(path: Path, checkpoint: Checkpoint) -> tuple[Probe, ...]:
    """The file's probes: 1 to MAX_PROMPTS, each of 1 to LONGEST tokens within the model's context.

    Names are unique; a line without one is `line-N`, a text file is called by its stem. Raises PromptError, naming
    file and line, for whatever is wrong with the file, text without a tokenizer included; TokenizerError for a
    tokenizer.json that is none.
    """
    try:
        with open_regular(path) as f:
            data = read_capped(f, MAX_BYTES)
    except CheckpointError as error:
        raise PromptError(error.what, "Give --prompts a text file or a .jsonl file that can be read.") from error
    except OSError as error:
        raise PromptError(
            f"{path} cannot be read: {error.strerror}", "Give --prompts a file that can be read."
        ) from error
    if len(data) > MAX_BYTES:
        raise PromptError(f"{path} has more than {MAX_BYTES} bytes", "Choose fewer or shorter prompts.")
    reader = _Reader(path, checkpoint)
    data = data.removeprefix(b"\xef\xbb\xbf")
    return reader.lines(data) if path.suffix.lower() == ".jsonl" else (reader.whole(data),)


def decode(checkpoint: Checkpoint) -> Callable[[Sequence[int]], str] | None:
    """What tokens say by the checkpoint's tokenizer, special tokens by name; None without a tokenizer.

    Ids that the tokenizer does not know say nothing, halves of a character U+FFFD. Raises TokenizerError for a
    tokenizer.json that is none.
    """
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        return None

    def text(ids: Sequence[int]) -> str:
        said: str = tokenizer.decode(list(ids), skip_special_tokens=False)
        return said

    return text


class _Reader:
    def __init__(self, path: Path, checkpoint: Checkpoint) -> None:
        self._path = path
        self._checkpoint = checkpoint
        self._tokenizer: Tokenizer | None = None

    def whole(self, data: bytes) -> Probe:
        """The one probe of a text file."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            self._refuse(data.count(b"\n", 0, error.start) + 1, "not UTF-8")
        stem = self._path.stem
        name = stem if stem.isprintable() and 0 < len(stem) <= MAX_NAME else "prompt"
        return Probe(name, self._checked(1, self._encode(1, text)))

    def lines(self, data: bytes) -> tuple[Probe, ...]:
        """The probes of a file of JSON lines."""
        found: dict[str, Probe] = {}
        for number, line in _numbered(data):
            if len(found) == MAX_PROMPTS:
                self._refuse(number, f"more than {MAX_PROMPTS} prompts")
            probe = self._probe(number, self._parse(number, line))
            if probe.name in found:
                self._refuse(number, f"the name {shown(probe.name)} is given twice")
            found[probe.name] = probe
        if not found:
            self._refuse(1, "no prompt in the file")
        return tuple(found.values())

    def _parse(self, number: int, line: bytes) -> object:
        if len(line) > MAX_LINE_BYTES:
            self._refuse(number, f"more than {MAX_LINE_BYTES} bytes in one line")
        return parse_json(line, f"{self._path}: line {number}", PromptError, next_step=NEXT_STEP)

    def _probe(self, number: int, parsed: object) -> Probe:
        fields = {"ids": parsed} if isinstance(parsed, list) else parsed
        if not isinstance(fields, dict):
            self._refuse(number, "neither an object nor a list of token ids")
        for key in fields:
            if key not in ("name", "text", "ids"):
                self._refuse(number, f"the key {shown(key)} is neither name, text nor ids")
        if ("text" in fields) == ("ids" in fields):
            self._refuse(number, "either text or ids has to be given")
        name = fields.get("name", f"line-{number}")
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MAX_NAME:
            self._refuse(number, f"the name is not 1 to {MAX_NAME} printable characters")
        return Probe(name, self._checked(number, fields["ids"] if "ids" in fields else self._text(number, fields)))

    def _text(self, number: int, fields: dict[str, object]) -> list[int]:
        text = fields["text"]
        if not isinstance(text, str):
            self._refuse(number, f"text is {shown(text)}, not a string")
        return self._encode(number, text)

    def _encode(self, number: int, text: str) -> list[int]:
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError:
            self._refuse(number, "the text holds half of a surrogate pair")
        if size > MAX_TEXT_BYTES:
            self._refuse(number, f"{size} bytes of text, which cannot be as few as {LONGEST} tokens")
        self._tokenizer = self._tokenizer or load_tokenizer(self._checkpoint)
        if self._tokenizer is None:
            raise PromptError(
                f"{self._path}: line {number}: text, and the checkpoint has no tokenizer.json",
                'Put the tokenizer.json beside the weights, or give token ids: {"ids": [...]} in a .jsonl file.',
            )
        return encode(self._tokenizer, text)

    def _checked(self, number: int, ids: object) -> tuple[int, ...]:
        """The ids, if this model can take them."""
        config = self._checkpoint.config
        if not isinstance(ids, list):
            self._refuse(number, f"ids is {shown(ids)}, not a list")
        if not ids:
            self._refuse(number, "no tokens")
        longest = min(LONGEST, config.max_positions)
        if len(ids) > longest:
            self._refuse(number, f"{len(ids)} tokens, more than the {longest} that a probe may have")
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int):
                self._refuse(number, f"ids holds {shown(token)}, not a token id")
            if not 0 <= token < config.vocab_size:
                self._refuse(number, f"the token id {token} is outside of the vocabulary of {config.vocab_size}")
        return tuple(ids)

    def _refuse(self, number: int, problem: str) -> NoReturn:
        raise PromptError(f"{self._path}: line {number}: {problem}", NEXT_STEP)


def _numbered(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, counted from 1 with those that are."""
    start = 0
    number = 0
    while start < len(data):
        number += 1
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        line = data[start:end].strip()
        if line:
            yield number, line
        start = end + 1
