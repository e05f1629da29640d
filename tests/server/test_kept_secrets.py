"""Secrets that the server knows are not in anything that it composes and keeps: errors, reasons,
dead letters, log lines. A real server, killed; then the bytes of all its files are searched.
"""

from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from eventflow.core.errors import TaskFailed
from eventflow.core.secrets import KNOWN_SECRETS
from eventflow.serialization.errors import decode_error, encode_error
from tests.conftest import wait_until
from tests.server_process import EventflowProcess, eventflow, start

SECRET = "s3cr3t-of-the-shop/42+x"
"""URL-encoded, in JSON, in repr and in base64 it looks different."""

SHOP = """
import base64, os
from urllib.parse import quote
from eventflow import App, Event, Permanent, Retry, current_run, flow, task
from triggers import Bearer, Webhook, env

secret = os.environ["SHOP_SECRET"]

class Refused(Exception):
    def __init__(self, url, detail):
        super().__init__(url, detail)
        self.url = url
        self.detail = detail
        self.key = secret.encode()

@task
async def connect(how: str) -> str:
    match how:
        case "message": raise ValueError(f"cannot log in with {secret}")
        case "url": raise OSError(2, "refused", "https://db/?key=" + quote(secret, safe=""))
        case "base64": raise RuntimeError(base64.b64encode(f"me:{secret}".encode()).decode())
        case "arguments": raise Refused(f"https://{secret}@db", {"tried": [secret]})
        case "cause":
            try:
                raise KeyError(secret)
            except KeyError as error:
                raise RuntimeError("no connection") from error
        case "note":
            error = RuntimeError("no connection")
            error.add_note(f"tried {secret}")
            raise error
        case "group": raise ExceptionGroup("two", [ValueError(secret), OSError(secret)])
    raise RuntimeError("unknown")

def broken_hook(error):
    raise RuntimeError(f"hook with {secret}")

@task(retries=Retry(attempts=2, delay=0.01), on_failure=broken_hook)
async def retried() -> None:
    raise Permanent(f"never with {secret}")

@flow
async def failing(how: str) -> None:
    await (retried() if how == "hook" else connect(how))

@flow
async def raising(how: str) -> None:
    print("printed", secret)
    raise RuntimeError(f"in the flow: {secret}")

@flow
async def waiting(how: str) -> None:
    from eventflow import sleep
    await sleep(3600)

@flow
async def returning(how: str) -> str:
    return f"data:{how}"

def bad_filter(event):
    raise ValueError(f"filter with {secret}")

def bad_params(event):
    raise ValueError(f"params with {secret}")

app = App("shop")
hook = Webhook("/orders", verify=Bearer(env("SHOP_SECRET")), id="id")
app.on(hook, failing, where=bad_filter, name="filter")
app.on(hook, failing, params=bad_params, name="params")
app.add(failing, raising, waiting, returning)
"""

HOWS = ("message", "url", "base64", "arguments", "cause", "note", "group", "hook")


def found_in(folder: Path, *texts: str) -> list[str]:
    """The files of the folder that contain one of the texts, but for the app itself."""
    return [
        file.name
        for file in folder.rglob("*")
        if file.is_file()
        and file.suffix != ".py"
        and any(text.encode() in file.read_bytes() for text in texts)
    ]


@pytest.fixture
def server(tmp_path: Path) -> Any:
    (tmp_path / "shop.py").write_text(SHOP)
    server = start(tmp_path, env={"SHOP_SECRET": SECRET})
    yield server
    server.kill()


def test_a_known_secret_is_in_nothing_that_is_kept(server: EventflowProcess, tmp_path: Path):
    """Errors of tasks and flows in all their parts, of filters, bindings and hooks, printed lines
    and the reason of a cancel quote the secret. After a kill -9 no file contains it in any form.
    """
    runs = [server.start("failing", how=how) for how in HOWS] + [server.start("raising", how="x")]
    for run in runs:
        whole = server.wait_for(run, "failed")
        assert "***" in str(whole["error"]) or "two" in str(whole["error"]), whole["error"]
    waiting = server.start("waiting", how="x")
    server.wait_for(waiting, "waiting")
    answer = server.post(f"/api/runs/{waiting}/cancel", {"reason": f"leaked {SECRET}"})
    assert answer.status_code == 202
    assert server.wait_for(waiting, "cancelled")["reason"] == "leaked ***"
    answer = server.client.post(
        "/hooks/orders", json={"id": "1", "how": "x"}, headers={"authorization": f"Bearer {SECRET}"}
    )
    assert answer.status_code == 202, answer.text
    dead = server.get("/api/dead")["dead"]
    assert len(dead) == 2 and all("with ***" in each["reason"] for each in dead)
    wait_until(lambda: "hook with ***" in server.log, "the line of the hook is written")
    server.kill()
    assert found_in(tmp_path, SECRET, "s3cr3t-of-the-shop", "bWU6czNjcjN0") == []


@pytest.mark.parametrize("how", HOWS[:-1])
def test_a_masked_error_is_read_in_a_second_process(
    server: EventflowProcess, tmp_path: Path, how: str
):
    """After a kill -9, a process that does not know the secret shows the error without it: in
    `show`, as text and JSON, in the logs and in the API. The store's files do not contain it.
    """
    run = server.start("failing", how=how)
    before = server.wait_for(run, "failed")["error"]
    server.kill()
    forms = (SECRET, quote(SECRET, safe=""), "s3cr3t", "bWU6czNjcjN0")
    assert found_in(tmp_path, *forms) == []
    shown = [
        eventflow(tmp_path, *args, SHOP_SECRET="another-secret-altogether")
        for args in (("show", run), ("show", run, "--json"), ("logs", run))
    ]
    for each in shown:
        assert each.returncode == 0, each.stderr
        assert not any(form in each.stdout + each.stderr for form in forms), each.stdout
    second = start(tmp_path, env={"SHOP_SECRET": "another-secret-altogether"})
    try:
        assert second.get(f"/api/runs/{run}")["error"] == before
    finally:
        second.kill()
    assert found_in(tmp_path, *forms) == []


def test_data_of_users_is_kept_as_it_is(server: EventflowProcess, tmp_path: Path):
    """Parameters and results are not altered, whatever they contain."""
    run = server.start("returning", how=SECRET)
    whole = server.wait_for(run, "completed")
    assert whole["state"] == "completed"
    server.kill()
    assert "shop.db-wal" in found_in(tmp_path, f"data:{SECRET}")


class Denied(Exception):
    """A class of its own with two arguments."""

    def __init__(self, who: str, key: object) -> None:
        super().__init__(who, key)
        self.who = who
        self.key = key

    def __str__(self) -> str:
        return f"{self.who} may not use {self.key!r}"


@pytest.mark.parametrize(
    "error",
    [
        Denied("me", "registered-in-this-test"),
        Denied("me", ["registered-in-this-test", {"deep": "x registered-in-this-test x"}]),
        OSError(13, "denied", "/mnt/registered-in-this-test"),
        KeyError("registered-in-this-test"),
        ValueError("text registered-in-this-test"),
    ],
)
def test_a_redacted_error_keeps_its_class(error: Exception):
    """The flow gets an error of the same class, with the secret masked in text and arguments."""
    KNOWN_SECRETS.register("registered-in-this-test")
    data = encode_error(error)
    again = decode_error(data)
    assert b"registered-in-this-test" not in data
    assert type(again) is type(error) and str(again) == str(error).replace(
        "registered-in-this-test", "***"
    )


def test_a_secret_in_bytes_costs_the_arguments():
    """A value that cannot be masked is not recorded; the text says what happened."""
    KNOWN_SECRETS.register("registered-in-this-test")
    data = encode_error(Denied("me", b"registered-in-this-test"))
    assert b"registered-in" not in data and b"cmVnaXN0ZXJlZC1pbi" not in data
    assert isinstance(decode_error(data), Exception | TaskFailed)
