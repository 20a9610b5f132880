"""`generate`: text from an artifact, streamed as it is made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gptoss_export.exporter.commands.artifact import ARTIFACT
from gptoss_export.exporter.commands.settings import Settings, common_options, threads_option
from gptoss_export.exporter.errors import PromptError, TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NEXT_STEP = "export again, or use --token-ids"


@click.command("generate")
@ARTIFACT
@click.option("--prompt", metavar="TEXT", help="Text to go on from, as it is: no chat template is added.")
@click.option("--token-ids", metavar="1,2,3", help="Token ids to go on from, instead of text.")
@click.option("--max-new-tokens", type=click.IntRange(0), default=64, show_default=True, help="Stop after so many.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Sample from this share of probability.")
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="Sample from so many (0: all).")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the sampling.")
@threads_option
@common_options
@click.pass_obj
def generate(
    settings: Settings,
    folder: Path,
    prompt: str | None,
    token_ids: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    threads: int | None,
) -> None:
    """Go on from a prompt with the artifact in OUT.

    Prints text, or token ids where the artifact has no tokenizer. Stops at the end-of-sequence ids that the
    checkpoint's generation config names. Warns on stderr when the artifact's verdict is no clean pass.

    \b
    Examples:
      gptoss-export generate ./release --prompt "The import statement"
      gptoss-export generate ./release --token-ids 200006,1428 --temperature 0.8 --top-p 0.95 --seed 7
    """
    from gptoss_export.engines.generate import generate as generate_tokens
    from gptoss_export.exporter.commands.show import warn_unless_clean
    from gptoss_export.exporter.pipeline import open_artifact

    if (prompt is None) == (token_ids is None):
        raise click.UsageError("give either --prompt or --token-ids")
    with settings.working() as progress, progress.task("load"):
        manifest, runner = open_artifact(folder, threads)
    warn_unless_clean(folder, manifest)
    tokenizer = load_tokenizer(folder)
    ids = _parse_ids(token_ids) if token_ids is not None else encode(tokenizer, folder, prompt or "")
    if len(ids) + max_new_tokens > manifest.model.max_positions:
        raise PromptError(
            f"{len(ids)} tokens of prompt and {max_new_tokens} new ones are more than the model's "
            f"{manifest.model.max_positions} positions",
            "shorten the prompt, or lower --max-new-tokens",
        )
    tokens = generate_tokens(
        runner,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_token_ids=manifest.model.eos_token_ids,
    )
    stream(tokens, tokenizer, ids, lambda text: click.echo(text, nl=False))
    click.echo()
    sys.stdout.flush()


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The artifact's tokenizer, if it has one. Raises TokenizerError for a file that is none."""
    from gptoss_export.exporter.checkpoint.tokenizer import read_tokenizer

    path = folder / "tokenizer.json"
    if path.is_symlink():
        raise TokenizerError(f"{path} is a symbolic link, and no file of an artifact is one", _NEXT_STEP)
    return read_tokenizer(path, _NEXT_STEP) if path.exists() else None


def encode(tokenizer: Tokenizer | None, folder: Path, prompt: str) -> list[int]:
    """The prompt's token ids."""
    from gptoss_export.exporter.checkpoint.tokenizer import raise_as_tokenizers

    if tokenizer is None:
        raise TokenizerError(f"{folder} has no tokenizer.json", "use --token-ids")
    try:
        ids: list[int] = tokenizer.encode(prompt).ids
    except (TypeError, UnicodeError) as error:  # surrogates: the shell gave bytes that are no text
        raise PromptError(
            "the prompt is not valid text", "give it in the terminal's encoding, or as --token-ids"
        ) from error
    except BaseException as error:
        raise_as_tokenizers(error, f"{folder / 'tokenizer.json'} is no tokenizer", _NEXT_STEP)
    return ids


def stream(
    tokens: Iterable[int], tokenizer: Tokenizer | None, prompt_ids: Sequence[int], write: Callable[[str], None]
) -> None:
    """Writes tokens as they come: whole characters with a tokenizer, ids between spaces without one."""
    if tokenizer is None:
        for count, token in enumerate(tokens):
            write(f" {token}" if count else str(token))
        return
    from tokenizers.decoders import DecodeStream

    decoder = DecodeStream(list(prompt_ids), skip_special_tokens=True)
    for token in tokens:
        # A character whose bytes are spread over tokens comes out with the last of them.
        text = decoder.step(tokenizer, token)
        if text:
            write(text)


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise PromptError(f"--token-ids {text[:80]!r} are no integers between commas", "such as 1,2,3") from error
