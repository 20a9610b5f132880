"""The stages that all targets of an export share: its weights and its graph."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_export.exporter.errors import IntegrityError
from gptoss_export.exporter.output.journal import Journal
from gptoss_export.exporter.planning.plan import Plan
from gptoss_export.exporter.progress import Progress
from gptoss_export.exporter.stopwatch import Stopwatch
from gptoss_export.exporter.weights import FileRecord, WeightsMode, place_weights

if TYPE_CHECKING:
    import onnx_ir as ir

    from gptoss_export.exporter.checkpoint.tensors import Checkpoint

_SIDE_FILES = "side files"


def weights_and_graph(
    plan: Plan, folders: Mapping[str, Path], builds: bool, journal: Journal, watch: Stopwatch, progress: Progress
) -> tuple[ir.Model | None, dict[str, FileRecord]]:
    """Places the weights in a thread, which the disk slows down, while this one makes the graph, if anything is built.

    folders: of the artifacts, by target. Files that the journal vouches for are not placed again. Returns the graph and
    the records of the checkpoint's files. Raises what `place_weights`, `check_scales` and `build_graph` raise.
    """
    from gptoss_export.exporter.checkpoint.open import check_scales
    from gptoss_export.exporter.graph.build import build_graph

    checkpoint, cancel, graph = plan.checkpoint, threading.Event(), None
    destinations = [folder / plan.weights_dir for folder in folders.values()]
    below = [folder.relative_to(journal.root) for folder in destinations]

    def finish(name: str, record: FileRecord) -> None:
        journal.finish(f"weights {name}", {(folder / name).as_posix(): record for folder in below})

    known = journal.files
    records = {name: known[file] for name in plan.checkpoint_files if (file := (below[0] / name).as_posix()) in known}
    missing = {name: path for name, path in plan.checkpoint_files.items() if name not in records}

    def place() -> dict[str, FileRecord]:
        with watch.stage("weights"):
            return place_weights(missing, destinations, plan.request.weights, progress, cancel, finish)

    with ThreadPoolExecutor(1, "weights") as pool:
        weights = pool.submit(place)
        try:
            if builds:
                with watch.stage("graph"):
                    with progress.task("check scales"):
                        check_scales(checkpoint)
                    _fail_early(weights)
                    with progress.task("graph"):
                        graph = build_graph(checkpoint.config, checkpoint.layout)
            records |= weights.result()
        except BaseException:
            cancel.set()
            raise
    if plan.weights_dir != "." and journal.result(_SIDE_FILES) is None:
        side = place_weights(
            {path.name: path for path in checkpoint.side_files}, list(folders.values()), WeightsMode.COPY
        )
        roots = [folder.relative_to(journal.root) for folder in folders.values()]
        journal.finish(_SIDE_FILES, {(root / name).as_posix(): side[name] for root in roots for name in side})
    return graph, {name: records[name] for name in plan.checkpoint_files}


def _fail_early(future: Future[dict[str, FileRecord]]) -> None:
    if future.done():
        future.result()


def placed_checkpoint(plan: Plan, folder: Path) -> Checkpoint:
    """The checkpoint as it lies in the artifact: what is built, compared and shipped are the same bytes.

    Raises IntegrityError for one that is not the plan's any more.
    """
    from gptoss_export.exporter.checkpoint.open import open_checkpoint

    placed = open_checkpoint(folder / plan.weights_dir)
    source = plan.checkpoint
    if (placed.config, placed.layout) != (
        source.config,
        source.layout,
    ) or placed.tensors.keys() != source.tensors.keys():
        raise IntegrityError(
            f"{source.root} changed while it was exported",
            "wait until the download or copy has ended, then run again",
        )
    return placed
