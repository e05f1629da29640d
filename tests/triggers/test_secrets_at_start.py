"""Secrets of the environment are needed when an app starts, not when it is imported."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eventflow import App, Event, flow
from eventflow.core.errors import EmptySecret
from eventflow.testing import result_of, running
from triggers import (
    HMAC,
    Bearer,
    DriftAlert,
    DriftMonitor,
    GitHub,
    GitLab,
    Kafka,
    KafkaSink,
    StandardWebhooks,
    Token,
    Webhook,
    env,
)

pytestmark = pytest.mark.anyio

SECRET = env("SHOP_SECRET_THAT_IS_NOT_SET")
SASL: dict[str, Any] = {
    "security_protocol": "SASL_PLAINTEXT",
    "sasl_mechanism": "PLAIN",
    "sasl_plain_username": "shop",
    "sasl_plain_password": SECRET,
}


@flow
async def handle(event: Event | None = None) -> int:
    return 1


def _webhook(verify: Any) -> App:
    app = App("shop")
    app.on(Webhook("/orders", verify=verify), handle)
    return app


def _kafka() -> App:
    app = App("shop")
    app.on(Kafka("orders", group_id="g", **SASL), handle)
    return app


def _sink() -> App:
    app = App("shop")
    app.send("order.paid", KafkaSink("orders", **SASL))
    return app


def _monitor() -> App:
    app = App("shop")
    source = Webhook("/orders", verify=GitHub(SECRET))
    app.on(DriftMonitor(source, features=["amount"]), handle)
    return app


def _drift_alert() -> App:
    app = App("shop")
    app.on(DriftAlert("/drift", verify=Bearer(["known", SECRET])), handle)
    return app


APPS: dict[str, Any] = {
    "GitHub": lambda: _webhook(GitHub(SECRET)),
    "StandardWebhooks": lambda: _webhook(StandardWebhooks(SECRET)),
    "GitLab, one of two": lambda: _webhook(GitLab("known", signing=SECRET)),
    "HMAC": lambda: _webhook(HMAC(SECRET, header="X-Sum")),
    "Token": lambda: _webhook(Token(SECRET, header="X-Token")),
    "DriftAlert, one of two": _drift_alert,
    "DriftMonitor": _monitor,
    "Kafka": _kafka,
    "KafkaSink": _sink,
}


@pytest.mark.parametrize("name", APPS)
async def test_an_app_is_made_without_its_secrets_and_does_not_start(
    name: str, tmp_path: Path
) -> None:
    """Declaring a source needs no secret; opening the app raises EmptySecret before the store."""
    app = APPS[name]()
    store = tmp_path / "shop.db"
    with pytest.raises(EmptySecret, match="SHOP_SECRET_THAT_IS_NOT_SET") as caught:
        await app.open(store=f"sqlite:///{store}")
    assert caught.value.exit_code == 3
    assert not store.exists()


async def test_a_secret_that_is_set_after_the_import_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The environment is read at the start, not at the import."""
    app = _webhook(GitHub(SECRET))
    monkeypatch.setenv("SHOP_SECRET_THAT_IS_NOT_SET", "s3cret")
    await app.open(store=f"sqlite:///{tmp_path}/shop.db")
    await app.close()


async def test_a_test_of_the_flow_needs_no_secret() -> None:
    """`running` opens the app without its secrets; its webhooks then refuse every request."""
    app = _webhook(GitHub(SECRET))
    async with running(app):
        assert await result_of(app, handle) == 1
    reason = GitHub(SECRET).reason_to_refuse({"x-hub-signature-256": "sha256=00"}, (), b"", 0)
    assert reason is not None
    assert "empty or unset" in reason


@pytest.mark.parametrize("command", [["serve", "shop:app", "--port", "0"], ["doctor", "--app"]])
def test_serve_and_doctor_exit_with_3(command: list[str], tmp_path: Path) -> None:
    """`eventflow serve` and `doctor` name the variable and exit with 3."""
    (tmp_path / "shop.py").write_text(
        "from eventflow import App, flow\n"
        "from triggers import GitHub, Webhook, env\n"
        "app = App('shop')\n"
        "@flow\nasync def handle(): ...\n"
        "app.on(Webhook('/orders', verify=GitHub(env('UNSET_SECRET'))), handle)\n"
    )
    arguments = [*command, "shop:app"] if command[-1] == "--app" else command
    done = subprocess.run(
        [sys.executable, "-m", "eventflow", *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "$UNSET_SECRET" in done.stdout + done.stderr
