"""One model in one process: loads it, warms it up, times decode and prefill, prints one line of JSON.

    python child.py ours ARTIFACT --target ort-cpu --threads 2
    ~/peers-venv/bin/python child.py llama MODEL.gguf --threads 2 --no-repack

compare.py starts it. Ours and the peer's do the same work: the same token ids, logits of the last position only, and
the largest of them looked up, so that a step ends when its logits are there. With --logits the logits of every position
are written, and nothing is timed: half of the ids in one call, the rest one by one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class Model(Protocol):
    vocab_size: int

    def reset(self) -> None:
        """Forgets every position."""

    def feed(self, ids: Ids, every: bool) -> Logits:
        """Goes on with `ids`; logits [n, vocab] of every one of them or [1, vocab] of the last."""


class Ours:
    """The artifact, through the same runner that `gptoss-export generate` has."""

    def __init__(self, path: Path, target: str, threads: int) -> None:
        from gptoss_export.engines.targets import TARGETS

        self._runner = TARGETS[target].open_runner(path, threads)
        self.vocab_size = self._runner.vocab_size
        self._cache: Any = None

    def reset(self) -> None:
        self._cache = None

    def feed(self, ids: Ids, every: bool) -> Logits:
        step = self._runner.forward(ids[None], cache=self._cache, keep=0 if every else 1)
        self._cache = step.cache
        logits: Logits = step.logits[0]
        return logits


class LlamaCpp:
    """llama.cpp through llama-cpp-python's bindings of its C API: mapped file, batch 512, its defaults otherwise.

    repack: whether it may copy weights into layouts of its own (its default).
    """

    def __init__(self, path: Path, repack: bool, threads: int, positions: int) -> None:
        import llama_cpp as api

        self._api = api
        self._silent = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self._silent, ctypes.c_void_p(0))
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        parameters.use_extra_bufts = repack
        model = api.llama_model_load_from_file(str(path).encode(), parameters)
        if not model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        options = api.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = positions, 512, 512
        options.n_threads = options.n_threads_batch = threads
        self._context = api.llama_init_from_model(model, options)
        if not self._context:
            raise SystemExit("llama.cpp cannot make a context")
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._batch = api.llama_batch_init(512, 0, 1)
        self._position = 0

    def reset(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._position = 0

    def feed(self, ids: Ids, every: bool) -> Logits:
        rows = []
        for start in range(0, len(ids), 512):
            chunk = ids[start : start + 512]
            wanted = range(len(chunk)) if every else [len(chunk) - 1] if start + 512 >= len(ids) else []
            self._decode(chunk, wanted)
            for i in wanted:
                row = self._api.llama_get_logits_ith(self._context, i)
                rows.append(np.ctypeslib.as_array(row, (self.vocab_size,)).copy())
        return np.stack(rows)

    def _decode(self, ids: Ids, wanted: Any) -> None:
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self._position + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, 0
        for i in wanted:
            batch.logits[i] = 1
        status = self._api.llama_decode(self._context, batch)
        if status != 0:
            raise SystemExit(f"llama_decode: {status}")
        self._position += len(ids)


@dataclass(frozen=True)
class Times:
    """Seconds of each decoded token and of each prefill; major_faults: pages read from the disk while timing."""

    load: float
    decode: list[float]
    prefill: list[float]
    prefill_tokens: int
    major_faults: int


def random_ids(vocab_size: int, count: int, seed: int = 0) -> Ids:
    return np.random.default_rng(seed).integers(0, vocab_size, count)


def timed(model: Model, ids: Ids) -> float:
    started = time.perf_counter()
    int(np.argmax(model.feed(ids, every=False)[-1]))
    return time.perf_counter() - started


def measure(model: Model, load: float, prompt: int, decode: int, prefill: int, repetitions: int) -> Times:
    """Warm-up is 128 tokens, which bring nearly every expert into this process's page tables, and two decode steps."""
    ids = random_ids(model.vocab_size, max(prompt + decode, prefill, 130))
    for part in (ids[:128], ids[128:129], ids[129:130]):
        timed(model, part)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    model.reset()
    timed(model, ids[:prompt])
    steps = [timed(model, ids[i : i + 1]) for i in range(prompt, prompt + decode)]
    prompts = []
    for _ in range(repetitions):
        model.reset()
        prompts.append(timed(model, ids[:prefill]))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults
    return Times(load, steps, prompts, prefill, faults)


def all_logits(model: Model, positions: int) -> Logits:
    """[positions, vocab]; the first half as one prompt, the second one by one."""
    ids, half = random_ids(model.vocab_size, positions), positions // 2
    parts = [ids[:half], *(ids[i : i + 1] for i in range(half, positions))]
    return np.concatenate([model.feed(part, every=True) for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=["ours", "llama"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--no-repack", action="store_true")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--logits", type=Path)
    parser.add_argument("--positions", type=int, default=192)
    a = parser.parse_args()
    # Importing is no part of loading.
    if a.kind == "ours":
        import onnxruntime  # noqa: F401
    else:
        import llama_cpp  # noqa: F401
    started = time.perf_counter()
    model: Model
    if a.kind == "ours":
        model = Ours(a.path, a.target, a.threads)
    else:
        model = LlamaCpp(a.path, not a.no_repack, a.threads, max(a.prompt + a.decode, a.prefill, a.positions, 256))
    load = time.perf_counter() - started
    if a.logits:
        np.save(a.logits, all_logits(model, a.positions))
    else:
        print(json.dumps(asdict(measure(model, load, a.prompt, a.decode, a.prefill, a.repetitions))))


if __name__ == "__main__":
    main()
