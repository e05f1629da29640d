"""What it costs to encode a result by its annotation and to verify it.

    python -m benchmarks.results

Prints µs per result, the best of some repetitions in one process. `bare` is without the codec: to
encode the value with msgspec, to decode it again, and to compare the two by `==`.
"""

import dataclasses
import timeit
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import msgspec

from eventflow.serialization.codecs import ResultCodec

REPETITIONS = 50


class Line(msgspec.Struct):
    sku: str
    n: int
    name: str | None = None
    is_ready: bool = True
    count: int = 0


class Price(msgspec.Struct):
    sku: str
    price: float
    n: int
    at: datetime


class Order(msgspec.Struct):
    ident: str
    lines: list[Line]
    tags: dict[str, str]


class Mixed(msgspec.Struct):
    anything: Any
    price: Decimal
    tags: set[str]


@dataclasses.dataclass
class Metrics:
    name: str
    steps: int
    loss: float
    note: str | None = None


def samples() -> dict[str, tuple[Any, Any]]:
    """Annotations and values, by what is printed of them."""
    lines = [Line(f"sku-{n}", n, f"name {n}") for n in range(100)]
    prices = [Price(f"sku-{n}", n * 1.5, n, datetime(2026, 1, 1, tzinfo=UTC)) for n in range(100)]
    orders = [Order("x", lines[:5], {"a": "b", "c": "d"}) for _ in range(100)]
    metrics = [Metrics(f"m-{n}", n, n / 3) for n in range(100)]
    mixed = [Mixed({"a": [n]}, Decimal("1.10"), {"a", "b"}) for n in range(100)]
    return {
        "Struct of texts and numbers": (Line, lines[0]),
        "100 Structs of texts and numbers": (list[Line], lines),
        "Struct with a float and a datetime": (Price, prices[0]),
        "100 Structs with a float and a datetime": (list[Price], prices),
        "Struct with a list of 5": (Order, orders[0]),
        "100 Structs with a list of 5": (list[Order], orders),
        "dataclass": (Metrics, metrics[0]),
        "100 dataclasses": (list[Metrics], metrics),
        "100 Structs with Any, Decimal and a set": (list[Mixed], mixed),
    }


def best(call: Any) -> float:
    """µs per call."""
    timer = timeit.Timer(call)
    number = max(timer.autorange()[0] // 20, 1)
    return min(timer.repeat(REPETITIONS, number)) / number * 1e6


def main() -> None:
    print(f"{'result':<42} {'µs':>8} {'bare':>8} {'ratio':>6}")
    for name, (annotation, value) in samples().items():
        codec = ResultCodec(annotation, "results")
        encoder = msgspec.json.Encoder()
        decoder = msgspec.json.Decoder(annotation)
        ours = best(lambda codec=codec, value=value: codec.encode(value))
        bare = best(
            lambda encoder=encoder, decoder=decoder, value=value: (
                decoder.decode(encoder.encode(value)) == value
            )
        )
        print(f"{name:<42} {ours:8.2f} {bare:8.2f} {ours / bare:6.2f}", flush=True)


if __name__ == "__main__":
    main()
