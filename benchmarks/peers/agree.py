"""Whether two programs compute the same model: the logits of the same random ids, side by side.

python benchmarks/peers/compare.py FOLDER --peers ~/peers-venv --layers 2 --agree
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def divergence(truth: Array, other: Array) -> float:
    """KL(truth || other) in nats of one position's logits, [vocab]."""
    p, q = log_softmax(truth.astype(np.float64)), log_softmax(other.astype(np.float64))
    return float((np.exp(p) * (p - q)).sum())


def error(truth: Array, other: Array) -> float:
    """Root mean square of the difference, its mean taken off, as a part of the truth's deviation; [vocab]."""
    return float((other - truth).std() / truth.std())


def agreement(commands: Sequence[tuple[str, Sequence[str]]], positions: int = 192) -> None:
    """Prints how far every model of `commands` (child.py) is from the first.

    The last of 192 positions no longer see the first ones in sliding layers.
    """
    with tempfile.TemporaryDirectory() as folder:
        logits: list[Array] = []
        for name, command in commands:
            file = Path(folder) / f"{len(logits)}.npy"
            done = subprocess.run([*command, "--logits", str(file), "--positions", str(positions)], check=False)
            if done.returncode:
                sys.exit(f"{name}: exit code {done.returncode}")
            logits.append(np.load(file))
            file.unlink()
    first, truth = commands[0][0], logits[0]
    print(f"| against {first}, {len(truth)} positions | mean KL, nats | same top-1 | relative RMS error, mean, worst |")
    print("|---|---|---|---|")
    for (name, _), other in zip(commands[1:], logits[1:], strict=True):
        pairs = list(zip(truth, other, strict=True))
        kl, off = ([of(t, o) for t, o in pairs] for of in (divergence, error))
        same = np.mean(truth.argmax(-1) == other.argmax(-1))
        print(f"| {name} | {np.mean(kl):.3g} | {same:.1%} | {np.mean(off):.3g}, {max(off):.3g} |")
