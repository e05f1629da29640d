"""How a crash loop that a person started begins and ends: loop.py, s3_loop.py, kafka_loop.py and
kafka_churn.py.
"""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path


def a_seed(given: int | None) -> int:
    """The one asked for, or a new one."""
    return random.SystemRandom().randrange(1 << 30) if given is None else given


def verdict(wrong: Sequence[str], folder: Path, again: str) -> int:
    """Prints what was found wrong, and the command that does it again; keeps the store in that case
    only. The exit code.
    """
    if not wrong:
        shutil.rmtree(folder)
        print("everything held")
        return 0
    print("\n".join(wrong[:50]))
    print(f"{len(wrong)} findings; the store is kept in {folder}")
    print(f"again: python -m {again}")
    return 1
