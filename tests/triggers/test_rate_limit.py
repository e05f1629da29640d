"""Floods of one sender over real HTTP: who is held back, who never is, and what that costs (threat
S11).
"""

import asyncio
import json
from pathlib import Path

import httpx2
import pytest

from eventflow.core.errors import UsageError
from eventflow.testing import VirtualClock
from eventflow.testing.trigger_contract import ContractLedger, listening
from tests.conftest import eventually
from tests.server_process import serving as server
from tests.triggers.hooks import Hook, over_http, posting
from tests.triggers.observed import ObservedTrigger
from tests.triggers.serving import post, raw, serving
from triggers.drift import DriftAlert
from triggers.rate_limit import MAX_ADDRESSES, RateLimiter, bucket_key
from triggers.signatures import Bearer
from triggers.webhook import Webhook

HERE, THERE = "203.0.113.7", "203.0.113.8"
"""Senders behind the tests' loopback proxy, as `X-Forwarded-For` names them."""


async def burst(hook: Hook, number: int, address: str, **headers: str) -> list[int]:
    return [
        (await hook.post({}, x_forwarded_for=address, **headers)).status_code for _ in range(number)
    ]


@pytest.mark.parametrize("make", [Webhook, DriftAlert])
def test_s11_a_sender_that_floods_is_429(make: type[Webhook] | type[DriftAlert]):
    """Five seconds' worth may come at once; then 429 with Retry-After, for that address alone,
    until time has passed.
    """
    clock = VirtualClock()

    async def check(hook: Hook) -> None:
        taken = await burst(hook, 10, HERE)
        assert 429 not in taken
        answer = await hook.post({}, x_forwarded_for=HERE)
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json() == {
            "error": "too_many_requests",
            "detail": "expected at most 2 requests a second from one address",
        }
        assert 429 not in await burst(hook, 1, THERE)
        await clock.advance(1.0)
        assert [status == 429 for status in await burst(hook, 3, HERE)] == [False, False, True]

    posting(make("/orders", verify="none", name="it", max_rate=2, clock=clock), check)


def test_s11_a_429_comes_before_the_body_and_the_signature():
    """A sender that is too fast is answered before its body and signature are read: its
    flood costs no digest.
    """

    async def check(hook: Hook) -> None:
        forged = {"authorization": "Bearer forged"}
        assert await burst(hook, 6, HERE, **forged) == [401] * 5 + [429]
        assert await burst(hook, 1, HERE, authorization="Bearer s3cret") == [429]
        head = post(
            "/hooks/orders",
            b"",
            ("X-Forwarded-For", HERE),
            ("Content-Length", "1000"),
            length=False,
        )
        status, headers, body = await raw(hook.port, head)
        assert (
            status == 429
            and headers["retry-after"] == "1"
            and json.loads(body)["error"] == "too_many_requests"
        )
        assert hook.ledger.offered == []

    over_http(check, verify=Bearer("s3cret"), max_rate=1, clock=VirtualClock())


def test_s11_the_connection_of_a_429_lives_on():
    """The rest of a refused body is dropped, and the next request on the same connection is read as
    one.
    """

    async def check(hook: Hook) -> None:
        assert await burst(hook, 5, HERE) == [202] * 5
        pair = post("/hooks/orders", b'{"a": 1}' * 5000, ("X-Forwarded-For", HERE)) + post(
            "/hooks/orders", b"{}"
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", hook.port)
        writer.write(pair)
        async with asyncio.timeout(15):
            text = await reader.readuntil(
                b'"detail":"expected at most 1 requests a second from one address"}'
            )
            assert text.startswith(b"HTTP/1.1 429 ")
            assert (await reader.readline()).startswith(b"HTTP/1.1 202 ")
        writer.close()

    over_http(check, max_rate=1, clock=VirtualClock())


def test_s11_loopback_is_never_held_back():
    """A sender on this machine may be a proxy for thousands: it is never refused. Nor is anybody
    with `max_rate=None`.
    """

    async def check(hook: Hook) -> None:
        assert {(await hook.post({})).status_code for _ in range(20)} == {202}
        assert set(await burst(hook, 20, "::1")) == {202}

    async def check_without(hook: Hook) -> None:
        assert set(await burst(hook, 20, HERE)) == {202}

    over_http(check, max_rate=1, clock=VirtualClock())
    over_http(check_without, max_rate=None, clock=VirtualClock())


def test_s11_the_default_is_out_of_the_way_of_honest_senders():
    """By default an address may send 5,000 requests at once and 1,000 in each second
    after.
    """
    clock, trigger = VirtualClock(), Webhook("/orders", verify="none")
    pace = trigger._rate_limiter
    assert pace is not None and pace.rate == 1000
    assert [pace.reserve(HERE, clock.monotonic()) > 0 for _ in range(5001)] == [False] * 5000 + [
        True
    ]
    assert [pace.reserve(HERE, clock.monotonic() + 1) > 0 for _ in range(1001)] == [
        False
    ] * 1000 + [True]


def test_s11_a_flood_is_one_line_a_second_and_a_gauge():
    """The log names the address at once, and counts the rest of the second at its end; the
    trigger's gauge counts all.
    """
    clock, ledger = VirtualClock(), ContractLedger()
    watched = ObservedTrigger(ledger)
    trigger = Webhook("/orders", verify="none", max_rate=1, clock=clock)

    async def main() -> None:
        async with (
            serving(trigger.routes) as port,
            listening(trigger, ledger),
            httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
        ):
            hook = Hook("/hooks/orders", port, ledger, client)
            assert (await burst(hook, 15, HERE)).count(429) == 10
            await eventually(lambda: len(watched.logged("webhook.refused")) == 2, "the summary")
            await clock.advance(1.0)
            assert (await burst(hook, 4, HERE)).count(429) == 3

    asyncio.run(main())
    first, second = watched.logged("webhook.refused")[:2]
    assert first["status"] == 429 and first["address"] == HERE and first["log_level"] == "warning"
    assert first["reason"] == "more than 1 requests a second from one address"
    assert (first["count"], second["count"]) == (1, 9)
    (gauge,) = trigger.gauges()
    assert (gauge.name, gauge.value) == ("requests_throttled", 13)


SHOP = """
from eventflow import App
from eventflow import flow
from triggers import Webhook

@flow
async def handle() -> None: ...

app = App("shop")
app.on(Webhook("/orders", verify="none", max_rate=0.001), handle)
"""


def test_s11_behind_a_proxy_the_senders_address_counts(tmp_path: Path):
    """With --behind-proxy it is the forwarded address that is held back; without it that header is
    anybody's to write.
    """
    (tmp_path / "shop.py").write_text(SHOP)
    for option, expected in ((["--behind-proxy"], [202] + [429] * 5), ([], [202] * 6)):
        with server(tmp_path, *option) as served:
            found = [
                served.client.post("/hooks/orders", json={}, headers={"x-forwarded-for": HERE})
                for _ in range(6)
            ]
            assert [each.status_code for each in found] == expected
            assert (
                served.client.post(
                    "/hooks/orders", json={}, headers={"x-forwarded-for": THERE}
                ).status_code
                == 202
            )
            name = 'eventflow_trigger_requests_throttled{trigger="webhook-orders"}'
            metric = f"{name} {expected.count(429)}.0"
            assert metric in served.client.get("/metrics").text


def test_s11_memory_is_bounded():
    """Whatever number of addresses sends, few are remembered; who owes most is forgotten last."""
    pace = RateLimiter(1.0)
    while not pace.reserve(HERE, 0.0):
        pass
    for number in range(3 * MAX_ADDRESSES):
        assert (
            pace.reserve(
                f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}",
                0.1 * number / MAX_ADDRESSES,
            )
            == 0.0
        )
        assert len(pace) <= MAX_ADDRESSES
    assert pace.reserve(HERE, 0.3) > 0


@pytest.mark.parametrize(
    ("address", "same", "other"),
    [
        (HERE, HERE, THERE),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", "2001:db8:1:3::1"),
        ("::ffff:203.0.113.7", HERE, "::ffff:203.0.113.8"),
        ("unix-proxy", "unix-proxy", "x" * 1000),
    ],
)
def test_s11_what_an_address_is(address: str, same: str, other: str):
    """IPv4 counts by address, however it is written, IPv6 by /64, and any other word by itself and
    in few bytes.
    """
    assert bucket_key(address) == bucket_key(same) != bucket_key(other)
    assert len(str(bucket_key(other))) <= 64


@pytest.mark.parametrize(
    "address", ["", "127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", "0:0:0:0:0:0:0:1"]
)
def test_s11_loopback_has_no_bucket(address: str):
    """Every way to write this machine's own address is known as such."""
    assert bucket_key(address) is None


@pytest.mark.parametrize("rate", [0, -1.0, float("inf"), float("nan")])
def test_max_rate_is_a_rate(rate: float):
    """A rate that is none is refused with what was expected."""
    with pytest.raises(UsageError, match=r"max_rate=\): expected requests per second, or None"):
        Webhook("/orders", verify="none", max_rate=rate)
