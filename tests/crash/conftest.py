"""What the tests of this folder begin with."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.lives import Lives


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[Lives]:
    """Boots on one folder; the last one is ended with the test."""
    lives = Lives(tmp_path)
    yield lives
    lives.end()
