"""The public surface is typed, and its objects have a repr worth reading."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eventflow import App, flow, task
from eventflow.testing import running
from triggers import S3, Cron, Directory, Every, Kafka, KafkaSink, RunState, Webhook

SAMPLE = Path(__file__).with_name("typed_sample.py")


def test_pyright_infers_what_the_sample_asserts(tmp_path: Path) -> None:
    """Strict pyright finds nothing in the typed sample: calls, results, `.fn`, `map`, and each
    misspelt option is an error (an unneeded ignore would be one too).
    """
    shutil.copy(SAMPLE, tmp_path)
    config = tmp_path / "pyrightconfig.json"
    config.write_text(
        json.dumps(
            {
                "extraPaths": [str(SAMPLE.parents[2])],
                "typeCheckingMode": "strict",
                "reportUnnecessaryTypeIgnoreComment": "error",
                "pythonVersion": "3.11",
            }
        )
    )
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "pyright",
            "-p",
            str(config),
            "--pythonpath",
            sys.executable,
            "--outputjson",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(found.stdout)
    errors = [
        f"{each['range']['start']['line'] + 1}: {each['message']}"
        for each in report["generalDiagnostics"]
    ]
    assert report["summary"]["filesAnalyzed"] == 1
    assert errors == []


@task
async def charge() -> None: ...


@flow
async def order() -> None: ...


REPRS: list[tuple[Any, str]] = [
    (charge, "<task 'charge': "),
    (order, "<flow 'order': "),
    (App("shop"), "<App 'shop' closed, store='sqlite:///.eventflow/shop.db', flows=0, triggers=0"),
    (Webhook("/orders", verify="none"), "Webhook('/orders', verify="),
    (Directory("/landing"), "Directory('/landing', name='files:/landing')"),
    (Kafka("orders", group_id="g"), "Kafka('orders', name='kafka:orders')"),
    (KafkaSink("scores"), "KafkaSink('scores', name='kafka:scores')"),
    (S3("bucket"), "S3('bucket', name="),
    (Cron("@daily"), "Cron('"),
    (Every(minutes=15), "Every('"),
    (RunState("order", "late", after=60), "RunState('order', 'late', after=60)"),
]


@pytest.mark.parametrize(("value", "expected"), REPRS, ids=lambda each: str(each)[:25])
def test_objects_have_a_repr_worth_reading(value: Any, expected: str) -> None:
    """A repr names the class and what tells one object from another."""
    assert repr(value).startswith(expected)
    assert " at 0x" not in repr(value)


@pytest.mark.anyio
async def test_a_run_handle_shows_its_run() -> None:
    """The repr of a handle has the run's id and flow, and whether its key was known."""
    async with running(App("shop")) as app:
        run = await app.start(order, idempotency_key="1")
        assert repr(run) == f"RunHandle('{run.id}', flow='order')"
        again = await app.start(order, idempotency_key="1")
        assert repr(again) == f"RunHandle('{run.id}', flow='order', duplicate=True)"
        assert repr(app).startswith("<App 'shop' open")
