"""The JSON API over a real app and its store: the requests, responses and errors of each path."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from eventflow import App, Permanent, current_run, flow, sleep, task
from eventflow.web.api import make_asgi
from tests.conftest import eventually
from triggers import Webhook

Client = httpx2.AsyncClient

STRUCTURED = {"content-type": "application/cloudevents+json"}
BATCH = {"content-type": "application/cloudevents-batch+json"}


class Switch:
    """Whether `fragile` succeeds yet."""

    broken = True


@task
async def double(total: float) -> float:
    return total * 2


@task
async def fragile(switch: str) -> str:
    if Switch.broken:
        raise Permanent("not yet")
    return switch


@flow
async def order(total: float) -> dict[str, float]:
    return {"score": await double(total)}


@flow
async def brittle() -> str:
    await double(1)
    return await fragile("on")


@flow
async def long() -> None:
    await sleep(3600)


@flow
async def large() -> str:
    assert current_run().id
    return "x" * 100_000


def shop(folder: Path) -> App:
    app = App("shop", store=f"sqlite:///{folder}/shop.db")
    app.on(
        Webhook("/orders", verify="none", id="id"), order, where={"total": [{"numeric": [">", 0]}]}
    )
    app.on("order.placed", order)
    for each in (brittle, long, large):
        app.add(each)
    return app


@asynccontextmanager
async def client_of(app: App) -> AsyncIterator[Client]:
    async with app:
        transport = httpx2.ASGITransport(make_asgi(app, auth=False, manage=False))
        async with Client(transport=transport, base_url="http://localhost", timeout=30) as client:
            yield client


def over(folder: Path, work: Callable[[Client], Awaitable[None]]) -> None:
    """`work` with a client of an open app."""

    async def go() -> None:
        Switch.broken = True
        async with client_of(shop(folder)) as client:
            await work(client)

    asyncio.run(go())


async def settled(client: Client, run: str, state: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    async def there() -> bool:
        found.update((await client.get(f"/api/runs/{run}")).json())
        return found["state"] == state

    await eventually(there, f"run {run} is {state}")
    return found


async def start(client: Client, name: str, **params: Any) -> str:
    answer = await client.post("/api/runs", json={"flow": name, "params": params})
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def event(ident: str = "e1", **changes: Any) -> dict[str, Any]:
    return {
        "specversion": "1.0",
        "id": ident,
        "source": "/test",
        "type": "order.placed",
        "data": {"total": 3},
        **changes,
    }


# --------------------------------------------------------------------------- events


def test_cloudevents_in_three_modes(tmp_path: Path):
    """Structured, binary and batch events start the subscriptions on their type."""

    async def work(client: Client) -> None:
        structured = await client.post("/api/events", json=event("s"), headers=STRUCTURED)
        headers = {
            "ce-specversion": "1.0",
            "ce-id": "b",
            "ce-source": "/test",
            "ce-type": "order.placed",
        }
        binary = await client.post("/api/events", json={"total": 4}, headers=headers)
        batch = await client.post("/api/events", json=[event("x"), event("y")], headers=BATCH)
        assert [each.status_code for each in (structured, binary, batch)] == [202] * 3
        assert structured.json()["event_id"] == "s" and [
            row["event_id"] for row in batch.json()
        ] == ["x", "y"]
        for ident in ("s", "b", "x", "y"):
            (run,) = (await client.get(f"/api/events/{ident}")).json()["runs"]
            await settled(client, run["id"], "completed")

    over(tmp_path, work)


def test_responses_to_events(tmp_path: Path):
    """202; 200 for a repeated event; 409 for the same id with other content; 400, 413, 415 for
    invalid requests.
    """

    async def work(client: Client) -> None:
        async def post(body: Any, headers: dict[str, str] = STRUCTURED) -> httpx2.Response:
            return await client.post("/api/events", content=body, headers=headers)

        first = await client.post("/api/events", json=event(), headers=STRUCTURED)
        again = await client.post("/api/events", json=event(), headers=STRUCTURED)
        assert (again.status_code, again.json()) == (200, {**first.json(), "duplicate": True})
        other = await client.post("/api/events", json=event(data={"total": 9}), headers=STRUCTURED)
        assert other.status_code == 409 and other.json()["error"] == "conflict"
        for body in (
            b"{",
            b"[]",
            b'{"specversion": "0.3", "id": "1"}',
            b'{"a": 1, "a": 2}',
            b"NaN",
        ):
            answer = await post(body)
            assert answer.status_code == 400 and set(answer.json()) == {"error", "detail"}, body
        assert (await post(b"[1]", BATCH)).status_code == 400
        assert (await post(b"{}", {"content-type": "application/json"})).status_code == 415
        assert (await post(b"{}", {**STRUCTURED, "content-encoding": "gzip"})).status_code == 415
        assert (await post(b"x" * (1 << 20) + b"x")).status_code == 413

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield b"x" * 100_000

        assert (
            await client.post("/api/events", content=chunks(), headers=STRUCTURED)
        ).status_code == 413
        empty = await client.post("/api/events", json=[], headers=BATCH)
        assert (empty.status_code, empty.json()) == (202, [])

    over(tmp_path, work)


def test_one_invalid_event_rejects_the_batch(tmp_path: Path):
    """A batch is recorded completely or not at all; the response names the invalid event."""

    async def work(client: Client) -> None:
        answer = await client.post(
            "/api/events", json=[event("a"), {**event("b"), "type": ""}], headers=BATCH
        )
        assert answer.status_code == 400 and "[1].type" in answer.json()["detail"]
        assert (await client.get("/api/counts")).json()["events"] == 0

    over(tmp_path, work)


def test_event_with_its_verdicts(tmp_path: Path):
    """An event shows the outcome of each delivery: its run and state, the filter condition that
    failed, or why it is dead.
    """

    async def work(client: Client) -> None:
        for number, total in (("good", 5), ("small", -1), ("odd", "many")):
            await client.post("/hooks/orders", json={"id": number, "total": total})
        good = (await client.get("/api/events/good")).json()
        (verdict,) = good["verdicts"]
        assert (
            verdict["outcome"] == "run"
            and verdict["run"] == good["runs"][0]["id"]
            and verdict["subscription"] == "webhook-orders/order"
        )
        assert good["event"]["data"] == {"id": "good", "total": 5}
        (verdict,) = (await client.get("/api/events/small")).json()["verdicts"]
        assert verdict["outcome"] == "filtered" and "total" in verdict["reason"]
        (verdict,) = (await client.get("/api/events/odd")).json()["verdicts"]
        assert verdict["outcome"] == "filtered"
        assert (await client.get("/api/events/nope")).status_code == 404
        assert good["received_at"].endswith("Z") and len(good["id"]) == 13

    over(tmp_path, work)


def test_event_ids_with_slashes(tmp_path: Path):
    """A sender's id may contain any characters; the event and its replay are found by it."""

    async def work(client: Client) -> None:
        await client.post("/api/events", json=event("a/b?c"), headers=STRUCTURED)
        assert (await client.get("/api/events/a%2Fb%3Fc")).json()["event_id"] == "a/b?c"
        assert (await client.post("/api/events/a%2Fb%3Fc/replay")).status_code == 202

    over(tmp_path, work)


def test_an_event_is_found_by_what_it_is_about(tmp_path: Path):
    """An event is found by its subject, such as the path of its file, or by the last part of it; if
    several match, the newest are listed. An id has precedence.
    """

    async def work(client: Client) -> None:
        for ident, subject in (("e-1", "in/a.csv"), ("e-2", "in/b.csv"), ("e-3", "other/b.csv")):
            body = event(ident, subject=subject)
            assert (await client.post("/api/events", json=body, headers=STRUCTURED)).is_success
        for name in ("in%2Fa.csv", "a.csv"):
            assert (await client.get(f"/api/events/{name}")).json()["event_id"] == "e-1"
        assert (await client.get("/api/events/in%2Fb.csv")).json()["event_id"] == "e-2"
        answer = await client.get("/api/events/b.csv")
        ids = [(await client.get(f"/api/events/e-{n}")).json()["id"] for n in (3, 2)]
        assert answer.status_code == 409 and ", ".join(ids) in answer.json()["detail"]
        assert (await client.get("/api/events/csv")).status_code == 404
        await client.post("/api/events", json=event("b.csv"), headers=STRUCTURED)
        assert (await client.get("/api/events/b.csv")).json()["event_id"] == "b.csv"
        missing = (await client.get("/api/runs/a.csv")).json()["detail"]
        assert "it names an event" in missing

    over(tmp_path, work)


def test_lists_and_their_pages(tmp_path: Path):
    """Lists are newest first; `next` pages through each row once; filters narrow them; invalid
    values are 400.
    """

    async def work(client: Client) -> None:
        await client.post("/api/events", json=[event(str(n)) for n in range(5)], headers=BATCH)
        await client.post("/api/events", json=event("other", type="thing.seen"), headers=STRUCTURED)
        seen: list[str] = []
        after: str | None = ""
        while after is not None:
            page = (
                await client.get(
                    "/api/events", params={"limit": 2, **({"after": after} if after else {})}
                )
            ).json()
            seen += [row["event_id"] for row in page["events"]]
            after = page["next"]
        assert seen == ["other", "4", "3", "2", "1", "0"]
        rows = (await client.get("/api/events", params={"type": "thing.seen"})).json()["events"]
        assert [row["event_id"] for row in rows] == ["other"]
        window = {"until": rows[0]["received_at"], "since": "2020-01-01T00:00:00Z"}
        assert len((await client.get("/api/events", params=window)).json()["events"]) == 5
        assert len((await client.get("/api/runs", params={"flow": "order"})).json()["runs"]) == 5
        assert (await client.get("/api/runs", params={"event": "0"})).json()["runs"][0][
            "flow"
        ] == "order"
        assert (await client.get("/api/runs", params={"flow": "nope"})).json() == {
            "runs": [],
            "next": None,
        }
        for query in ("limit=x", "state=odd", "since=yesterday", "after=1", "limit=-1"):
            assert (
                await client.get(
                    f"/api/runs?{query}" if "state" in query else f"/api/events?{query}"
                )
            ).status_code == 400

    over(tmp_path, work)


def test_replay(tmp_path: Path):
    """A replay starts new runs of the recorded event, for one flow if requested; a dry run starts
    none.
    """

    async def work(client: Client) -> None:
        await client.post("/hooks/orders", json={"id": "r", "total": 5})
        dry = await client.post("/api/events/r/replay", json={"dry_run": True})
        assert dry.status_code == 200
        assert dry.json()["verdicts"] == [
            {"subscription": "webhook-orders/order", "outcome": "run"}
        ]
        assert len((await client.get("/api/events/r")).json()["runs"]) == 1
        done = await client.post("/api/events/r/replay", json={"to": "order"})
        assert done.status_code == 202
        await settled(client, done.json()["verdicts"][0]["run"], "completed")
        assert len((await client.get("/api/events/r")).json()["runs"]) == 2
        wrong = await client.post("/api/events/r/replay", json={"to": "nobody"})
        assert wrong.status_code == 409 and "webhook-orders/order" in wrong.json()["detail"]
        assert (await client.post("/api/events/none/replay")).status_code == 404
        counts = (await client.get("/api/counts")).json()
        assert counts["accepted"] == 2 and counts["completed"] == 2 and counts["events"] == 1

    over(tmp_path, work)


# --------------------------------------------------------------------------- runs


def test_run_by_name(tmp_path: Path):
    """A run starts by its flow's name, once per idempotency key; errors distinguish wrong names
    from wrong parameters.
    """

    async def work(client: Client) -> None:
        body = {"flow": "order", "params": {"total": 2}, "idempotency_key": "k"}
        first = await client.post("/api/runs", json=body)
        again = await client.post("/api/runs", json=body)
        assert (first.status_code, again.status_code) == (202, 200)
        assert again.json() == {**first.json(), "duplicate": True}
        other = await client.post("/api/runs", json={**body, "params": {"total": 3}})
        assert other.status_code == 409
        found = await settled(client, first.json()["id"], "completed")
        assert (
            found["result"] == {"score": 4.0}
            and found["params"] == {"total": 2}
            and len(found["result_digest"]) == 16
        )
        for wrong, status, detail in (
            ({"flow": "nope"}, 404, "nope"),
            ({}, 400, "flow"),
            ({"flow": "order", "params": []}, 400, "params"),
            ({"flow": "order"}, 400, "total"),
            ({"flow": "order", "params": {"total": "x"}}, 400, "total"),
            ({"flow": 1}, 400, "flow"),
        ):
            answer = await client.post("/api/runs", json=wrong)
            assert answer.status_code == status and detail in answer.json()["detail"], wrong
        assert (await client.post("/api/runs", content=b"[]")).status_code == 400

    over(tmp_path, work)


def test_run_with_its_tasks_and_error(tmp_path: Path):
    """A failed run shows its tasks, attempts and errors; `retry` keeps recorded values and
    completes it.
    """

    async def work(client: Client) -> None:
        run = await start(client, "brittle")
        found = await settled(client, run, "failed")
        assert (
            found["error"]["type"].endswith("Permanent") and found["error"]["message"] == "not yet"
        )
        good, bad = found["tasks"]
        assert (good["name"], good["state"], bad["name"], bad["state"]) == (
            "double",
            "completed",
            "fragile",
            "failed",
        )
        assert bad["errors"][0]["message"] == "not yet" and bad["errors"][0]["attempt"] == 1
        Switch.broken = False
        assert (await client.post(f"/api/runs/{run}/retry")).status_code == 202
        found = await settled(client, run, "completed")
        assert found["result"] == "on" and found["tasks"][1]["attempts"] == 2
        assert (await client.post(f"/api/runs/{run}/retry")).status_code == 409
        assert (await client.get("/api/runs/nope")).status_code == 404

    over(tmp_path, work)


def test_cancel(tmp_path: Path):
    """A waiting run is cancelled with its reason; a run that has ended is not."""

    async def work(client: Client) -> None:
        run = await start(client, "long")
        await settled(client, run, "waiting")
        answer = await client.post(f"/api/runs/{run}/cancel", json={"reason": "not needed"})
        assert answer.status_code == 202
        assert (await settled(client, run, "cancelled"))["reason"] == "not needed"
        assert (await client.post(f"/api/runs/{run}/cancel")).status_code == 409

    over(tmp_path, work)


def test_large_results_are_not_shown(tmp_path: Path):
    """Of a result over 64 KiB only size and digest are returned."""

    async def work(client: Client) -> None:
        found = await settled(client, await start(client, "large"), "completed")
        assert found["result"] is None and found["result_size"] > 100_000 and found["result_digest"]

    over(tmp_path, work)


# --------------------------------------------------------------------------- dead letters, triggers


def test_redrive_with_a_correction(tmp_path: Path):
    """A dead letter shows its bytes, and is redriven once, corrected; the sum of counts holds."""

    async def work(client: Client) -> None:
        await client.post("/api/events", json=event("d", data={"totl": 3}), headers=STRUCTURED)
        (letter,) = (await client.get("/api/dead")).json()["dead"]
        assert letter["subscription"] == "events/order" and "total" in letter["reason"]
        whole = (await client.get(f"/api/dead/{letter['id']}")).json()
        assert whole["body"]["data"] == {"totl": 3}
        counts = (await client.get("/api/counts")).json()
        assert (counts["accepted"], counts["dead"]) == (1, 1)
        done = await client.post(f"/api/dead/{letter['id']}/redrive", json={"data": {"total": 3}})
        assert done.status_code == 202
        await settled(client, done.json()["verdicts"][0]["run"], "completed")
        counts = (await client.get("/api/counts")).json()
        assert (counts["accepted"], counts["dead"], counts["completed"]) == (1, 0, 1)
        assert (await client.post(f"/api/dead/{letter['id']}/redrive")).status_code == 409
        assert (await client.get("/api/dead")).json()["dead"] == []
        assert (await client.post("/api/dead/99/redrive")).status_code == 404

    over(tmp_path, work)


def test_undecodable_bytes_are_redriven_with_data(tmp_path: Path):
    """Undecodable bytes cannot be redriven as recorded, but with data in their place."""

    async def work(client: Client) -> None:
        assert (
            await client.post("/hooks/orders", content=b"{", headers={"webhook-id": "u"})
        ).status_code == 400
        (letter,) = (await client.get("/api/dead")).json()["dead"]
        assert (await client.post(f"/api/dead/{letter['id']}/redrive")).status_code == 409
        done = await client.post(f"/api/dead/{letter['id']}/redrive", json={"data": {"total": 3}})
        assert done.status_code == 202
        await settled(client, done.json()["verdicts"][0]["run"], "completed")

    over(tmp_path, work)


def test_pause_and_resume(tmp_path: Path):
    """Events of a paused trigger are recorded with paused runs, through a restart; resume releases
    exactly those.
    """

    async def first() -> str:
        async with client_of(shop(tmp_path)) as client:
            assert (await client.post("/api/triggers/webhook-orders/pause")).json()[
                "paused"
            ] is True
            assert (await client.post("/api/triggers/nope/pause")).status_code == 404
            assert (
                await client.post("/hooks/orders", json={"id": "p1", "total": 1})
            ).status_code == 202
            (run,) = (await client.get("/api/events/p1")).json()["runs"]
            assert run["state"] == "paused"
            return run["id"]

    async def second(run: str) -> None:
        async with client_of(shop(tmp_path)) as client:
            (row,) = (await client.get("/api/triggers")).json()["triggers"]
            assert (
                row["paused"] is True
                and row["verified"] is False
                and row["paths"] == ["/hooks/orders"]
            )
            await client.post("/hooks/orders", json={"id": "p2", "total": 2})
            assert (await client.get("/api/events/p2")).json()["verdicts"][0]["outcome"] == "paused"
            assert (await client.post("/api/triggers/webhook-orders/resume")).json()[
                "paused"
            ] is False
            await settled(client, run, "completed")
            (other,) = (await client.get("/api/events/p2")).json()["runs"]
            await settled(client, other["id"], "completed")
            await client.post("/hooks/orders", json={"id": "p3", "total": 3})
            (third,) = (await client.get("/api/events/p3")).json()["runs"]
            await settled(client, third["id"], "completed")
            assert (await client.get("/api/check")).json() == {"wrong": []}

    run = asyncio.run(first())
    asyncio.run(second(run))


# --------------------------------------------------------------------------- the rest


def test_errors_reveal_no_secrets(tmp_path: Path):
    """Unknown paths and wrong methods are answered in JSON; an internal error has an id and no
    traceback.
    """

    async def go() -> None:
        app = shop(tmp_path)
        async with app:
            asgi = make_asgi(app, auth=False, manage=False)
            transport = httpx2.ASGITransport(asgi, raise_app_exceptions=False)
            async with Client(transport=transport, base_url="http://localhost") as client:
                assert (await client.get("/api/nope")).json()["error"] == "not_found"
                wrong = await client.put("/api/runs")
                assert wrong.status_code == 405 and "POST" in wrong.headers["allow"]
                app.triggers.append(object())  # type: ignore[arg-type]
                broken = await client.get("/api/triggers")
                app.triggers.pop()
                assert broken.status_code == 500 and broken.json()["error"] == "internal"
                assert "Traceback" not in broken.text and "object" not in broken.text

    asyncio.run(go())


def test_metrics(tmp_path: Path):
    """/metrics has the deliveries by state, the triggers and the loops."""

    async def work(client: Client) -> None:
        await client.post("/hooks/orders", json={"id": "m", "total": 5})
        (run,) = (await client.get("/api/events/m")).json()["runs"]
        await settled(client, run["id"], "completed")
        text = (await client.get("/metrics")).text
        for line in (
            'eventflow_deliveries{state="completed"} 1.0',
            "eventflow_events_total 1.0",
            "eventflow_duplicates_total 0.0",
            'eventflow_trigger_up{kind="Webhook",trigger="webhook-orders"} 1.0',
            'eventflow_loop_lag_seconds{loop="intake"}',
        ):
            assert line in text

    over(tmp_path, work)


def test_backup(tmp_path: Path):
    """A backup is a complete store; it never overwrites a file."""

    async def work(client: Client) -> None:
        await client.post("/hooks/orders", json={"id": "m", "total": 5})
        path = str(tmp_path / "copy.db")
        assert (await client.post("/api/backup", json={"path": path})).status_code == 200
        assert (await client.post("/api/backup", json={"path": path})).status_code == 409
        assert (await client.post("/api/backup", json={"path": "copy.db"})).status_code == 400

    over(tmp_path, work)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy.db").rename(tmp_path / "copy" / "shop.db")

    async def look(client: Client) -> None:
        assert (await client.get("/api/events/m")).json()["event_id"] == "m"

    over(tmp_path / "copy", look)


@pytest.mark.parametrize("full", [1])
def test_a_full_ledger_slows_senders_down(tmp_path: Path, full: int):
    """While the ledger is full a POST waits two seconds, then is answered 503 with Retry-After."""

    async def go() -> None:
        app = App("shop", store=f"sqlite:///{tmp_path}/shop.db", max_pending=full)
        app.on("order.placed", long)
        async with client_of(app) as client:
            assert (
                await client.post("/api/events", json=event("1", data={}), headers=STRUCTURED)
            ).status_code == 202
            begun = asyncio.get_running_loop().time()
            answer = await client.post("/api/events", json=event("2", data={}), headers=STRUCTURED)
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
            assert 1 < asyncio.get_running_loop().time() - begun < 4
            assert (await client.get("/readyz")).status_code == 503

    asyncio.run(go())
