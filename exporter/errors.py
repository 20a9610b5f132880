"""Every error that a user can meet, its exit code and its next step.

    GptossExportError
    +-- CheckpointError               what was given as --model
    |   +-- ConfigError               10  config.json is missing, unreadable or describes another network
    |   +-- AmbiguousRopeError        11  YaRN without `truncate`: two meanings are in use, so none is assumed
    |   +-- CheckpointNotFoundError   12  no folder, no known layout, or not in the Hub cache
    |   +-- HubError                  13  the Hub could not be reached, or refused
    |   +-- UnsafeFileError           14  pickle files, devices, links that lead nowhere
    |   +-- HeaderError               15  a safetensors header that is no such thing
    |   +-- ShardIndexError           16  the shard index is malformed or names a file that is not there
    |   +-- MissingTensorError        20
    |   +-- SurplusTensorError        21
    |   +-- DuplicateTensorError      22
    |   +-- OverlappingTensorError    23
    |   +-- TruncatedFileError        24
    |   +-- WrongDtypeError           25
    |   +-- WrongShapeError           26
    |   +-- InvalidScaleError         27  an MXFP4 scale of 255, which is NaN
    |   +-- AbsurdSizeError           28  sizes no gpt-oss has
    |   +-- NonFiniteWeightError      29  an infinite or NaN weight that was to be quantised
    +-- BuildError
    |   +-- TargetUnavailableError    30  this host lacks what the target needs
    |   +-- GraphError                31  tracing, assembling or checking the graph failed
    |   +-- SessionError              32  the engine refused the model that was built
    |   +-- EngineBuildError          33  TensorRT refused the graph, or its process died
    |   +-- EngineMismatchError       34  an engine for another GPU, package or version than this host's
    |   +-- WeightRangeError          35  a weight that the target's number format cannot hold
    +-- ArtifactError                     what lies, or should lie, in --output
    |   +-- OutputExistsError         40
    |   +-- WeightsModeError          41  hardlink or in-place where the folders do not allow it
    |   +-- ArtifactNotFoundError     42  no complete artifact in the folder
    |   +-- ManifestError             43  the manifest is unreadable or of an unknown version
    |   +-- IntegrityError            44  a file is not the one that the manifest names
    |   +-- DiskSpaceError            45
    |   +-- TokenizerError            46  no tokenizer where text was given or asked for
    |   +-- AccessError               47  a file or folder that this user may not read or write
    |   +-- LockedError               48  another run writes or validates this artifact
    |   +-- SignedError               49  the artifact is signed, and a change would end its signature
    +-- ParityError
    |   +-- ParityFailedError         50  the artifact is not the model, by the gates of its target
    |   +-- NotValidatedError         51  a verdict was asked for, and none was ever made
    |   +-- NotExecutedError          52  the engine was built and never run: only its graph was compared
    |   +-- RegressionError           53  an artifact is worse than the one before it
    |   +-- NotComparableError        54  two reports that are not about the same measurement
    |   +-- LoosenedGatesError        57  the verdict was taken by gates looser than the target's own
    +-- ProvenanceError                   who vouches for an artifact, and when
    |   +-- SignatureError            55  an artifact that is not signed, or not by whom it should be
    |   +-- TimeStampError            56  SOURCE_DATE_EPOCH is no time
    +-- PromptError                   60  prompts or token ids that this model cannot take
    +-- OutOfMemoryError              61  this machine's memory was not enough

Exit code 0 is success, 1 a bug of ours, 2 a wrong command line, 130 Ctrl-C, 143 SIGTERM.
`docs/exit-codes.md` is made of this table.
"""

from __future__ import annotations

import re
from typing import ClassVar


class GptossExportError(Exception):
    """An error with one line that says what happened and one that says what to do about it."""

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "bug"
    """The name of the error for machines: that of its class without `Error`, as `checkpoint-not-found`."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "exit_code" in vars(cls):
            cls.kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", cls.__name__.removesuffix("Error")).lower()

    def __init__(self, what: str, next_step: str) -> None:
        super().__init__(what)
        self.what = what
        self.next_step = next_step


class CheckpointError(GptossExportError):
    """The checkpoint cannot be exported as it is."""


class ConfigError(CheckpointError):
    exit_code = 10


class AmbiguousRopeError(CheckpointError):
    exit_code = 11


class CheckpointNotFoundError(CheckpointError):
    exit_code = 12


class HubError(CheckpointError):
    exit_code = 13


class UnsafeFileError(CheckpointError):
    exit_code = 14


class HeaderError(CheckpointError):
    exit_code = 15


class ShardIndexError(CheckpointError):
    exit_code = 16


class MissingTensorError(CheckpointError):
    exit_code = 20


class SurplusTensorError(CheckpointError):
    exit_code = 21


class DuplicateTensorError(CheckpointError):
    exit_code = 22


class OverlappingTensorError(CheckpointError):
    exit_code = 23


class TruncatedFileError(CheckpointError):
    exit_code = 24


class WrongDtypeError(CheckpointError):
    exit_code = 25


class WrongShapeError(CheckpointError):
    exit_code = 26


class InvalidScaleError(CheckpointError):
    exit_code = 27


class AbsurdSizeError(CheckpointError):
    exit_code = 28


class NonFiniteWeightError(CheckpointError):
    exit_code = 29


class BuildError(GptossExportError):
    """The target could not be built."""


class TargetUnavailableError(BuildError):
    exit_code = 30


class GraphError(BuildError):
    exit_code = 31


class SessionError(BuildError):
    exit_code = 32


class EngineBuildError(BuildError):
    exit_code = 33


class EngineMismatchError(BuildError):
    exit_code = 34


class WeightRangeError(BuildError):
    exit_code = 35


class ArtifactError(GptossExportError):
    """The output folder is not what it has to be."""


class OutputExistsError(ArtifactError):
    exit_code = 40


class WeightsModeError(ArtifactError):
    exit_code = 41


class ArtifactNotFoundError(ArtifactError):
    exit_code = 42


class ManifestError(ArtifactError):
    exit_code = 43


class IntegrityError(ArtifactError):
    exit_code = 44


class DiskSpaceError(ArtifactError):
    exit_code = 45


class TokenizerError(ArtifactError):
    exit_code = 46


class AccessError(ArtifactError):
    exit_code = 47


class LockedError(ArtifactError):
    exit_code = 48


class SignedError(ArtifactError):
    exit_code = 49


class ParityError(GptossExportError):
    """The artifact is not shown to be the model."""


class ParityFailedError(ParityError):
    exit_code = 50


class NotValidatedError(ParityError):
    exit_code = 51


class NotExecutedError(ParityError):
    exit_code = 52


class RegressionError(ParityError):
    exit_code = 53


class NotComparableError(ParityError):
    exit_code = 54


class LoosenedGatesError(ParityError):
    exit_code = 57


class ProvenanceError(GptossExportError):
    """Nobody who is trusted vouches for the artifact, or no time can be written into it."""


class SignatureError(ProvenanceError):
    exit_code = 55


class TimeStampError(ProvenanceError):
    exit_code = 56


class PromptError(GptossExportError):
    exit_code = 60


class OutOfMemoryError(GptossExportError):
    exit_code = 61
