"""`make test ARGS=…` installs what the tests that ARGS picks need, and no more."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def planned(folder: Path, *options: str) -> str:
    """What make would do in a fresh clone."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(
        [
            "make",
            "--no-print-directory",
            "-n",
            "-C",
            ROOT,
            f"VENV={folder}/venv",
            f"AWS={folder}/aws",
            *options,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize(
    ("args", "needs_aws"),
    [
        ("", True),
        ("tests/core/test_retry.py", False),
        ("tests/core/test_retry.py::test_one -q", False),
        ("tests/triggers/test_kafka.py", False),
        ("tests/triggers/test_s3.py", True),
        ("tests/core/test_retry.py tests/triggers/test_s3_queue.py", True),
        ("tests/serialization/test_s3_blobs.py -x", True),
        ("tests/triggers/test_drift_sources.py", True),
        ("tests/triggers", True),
        ("tests/core", False),
        ("tests/core/test_retry.py tests/triggers", True),
        ("-k s3", True),
    ],
)
def test_the_local_aws_services_are_installed_for_tests_of_s3_only(
    tmp_path: Path, args: str, needs_aws: bool
):
    """Files, tests and folders that use the AWS services need a second environment, and so does a
    choice that is not by path; others do not.
    """
    plan = planned(tmp_path, "test", f"ARGS={args}")
    assert (f"{tmp_path}/aws" in plan) == needs_aws, plan
    assert plan.count("-m pip") == (2 if needs_aws else 1)
    assert plan.rstrip().endswith(f"-m pytest -n 2 {args}".rstrip())


def test_the_demo_needs_no_tools_of_developers(tmp_path: Path):
    """`make demo` installs the package alone."""
    plan = planned(tmp_path, "demo")
    assert "--editable ." in plan and "[dev]" not in plan and f"{tmp_path}/aws" not in plan
