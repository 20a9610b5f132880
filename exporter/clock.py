"""The time that goes on record: one clock, which whoever wants the same bytes twice can stop."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime

from gptoss_export.exporter.errors import TimeStampError


def now() -> str:
    """The time in UTC, to the second; of SOURCE_DATE_EPOCH (https://reproducible-builds.org) where that is set.

    Raises TimeStampError for one that is no number of seconds since 1970.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is None:
        return datetime.now(UTC).isoformat(timespec="seconds")
    if not re.fullmatch(r"[0-9]{1,11}", epoch):
        raise TimeStampError(
            f"SOURCE_DATE_EPOCH is {epoch[:40]!r}, which is no number of seconds since 1970",
            "unset it, or set it to one, such as `git log -1 --format=%ct` prints",
        )
    return datetime.fromtimestamp(int(epoch), UTC).isoformat(timespec="seconds")
