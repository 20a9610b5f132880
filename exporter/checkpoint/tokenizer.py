"""The only reader of tokenizer.json: a regular file of bounded size, parsed by the tokenizers library in Rust.

What the file says of padding and truncation is not kept: a text is its tokens, and a file that pads every text to a
trillion of them would end the process.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gptoss_export.exporter.checkpoint.files import one_line, open_regular, read_capped
from gptoss_export.exporter.errors import CheckpointError, TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TOKENIZER_BYTES = 256 << 20
"""The released file has 27 MB."""


def read_tokenizer(path: Path, next_step: str) -> Tokenizer:
    """The tokenizer in `path`. Raises TokenizerError, with that next step, for whatever is none."""
    from tokenizers import Tokenizer

    try:
        with open_regular(path) as file:
            data = read_capped(file, MAX_TOKENIZER_BYTES)
    except CheckpointError as error:
        raise TokenizerError(error.what, next_step) from error
    if len(data) > MAX_TOKENIZER_BYTES:
        raise TokenizerError(f"{path} has more than {MAX_TOKENIZER_BYTES} bytes", next_step)
    try:
        tokenizer: Tokenizer = Tokenizer.from_buffer(data)
        tokenizer.no_padding()
        tokenizer.no_truncation()
    except BaseException as error:
        raise_as_tokenizers(error, f"{path} is no tokenizer", next_step)
    return tokenizer


def raise_as_tokenizers(error: BaseException, what: str, next_step: str) -> NoReturn:
    """Raises TokenizerError for an error of the library, and the error itself where it is another's.

    The library raises bare Exception; a panic of its Rust is a PanicException, which is a BaseException.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    raise TokenizerError(f"{what}: {one_line(error)}", next_step) from error
