"""What all tests share: the small trained checkpoint."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_dir() -> Path:
    """A trained gpt-oss of 4 layers and 16 experts in the released format."""
    return Path(__file__).parent / "data" / "tiny-gpt-oss"
