"""Every trigger of the tree runs the contract: one that is added without it fails here."""

import importlib.util
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import triggers
from eventflow.events.event import Trigger
from eventflow.testing.trigger_contract import CONTRACT, TriggerHarness

HERE = Path(__file__).parent


def trigger_classes() -> Iterator[type]:
    """The public classes with a `listen`, whatever `triggers/` they live in."""
    for name in triggers.__all__:
        public = getattr(triggers, name)
        if isinstance(public, type) and hasattr(public, "listen"):
            yield public


def modules_with_contract() -> Iterator[ModuleType]:
    """The test modules of this folder that run all of CONTRACT."""
    for path in sorted(HERE.glob("test_*.py")):
        if "CONTRACT" not in path.read_text() or path == Path(__file__):
            continue
        spec = importlib.util.spec_from_file_location(f"contract_of_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if any(map(runs_contract, vars(module).values())):
            yield module


def runs_contract(test: object) -> bool:
    marks = getattr(test, "pytestmark", ()) if inspect.isfunction(test) else ()
    return any(mark.name == "parametrize" and mark.args[1] is CONTRACT for mark in marks)


def harnessed_classes(module: ModuleType) -> Iterator[type]:
    """What `trigger` of each harness of the module, or of one that it imports, is annotated to
    return.
    """
    for public in vars(module).values():
        if isinstance(public, type) and issubclass(public, TriggerHarness):
            yield typing.get_type_hints(public.trigger)["return"]


def test_every_trigger_runs_the_contract():
    """Each trigger class in `triggers.__all__` has a TriggerHarness whose `trigger` returns it, in
    a module that runs CONTRACT.
    """
    known = {kind for module in modules_with_contract() for kind in harnessed_classes(module)}
    missing = [kind.__name__ for kind in trigger_classes() if kind not in known]
    assert not missing, (
        f"expected a TriggerHarness with `def trigger(self) -> {missing[0]}` in tests/triggers/, "
        "and a test over "
        f"CONTRACT beside it; found none for {', '.join(missing)}; see "
        "docs/guides/write-a-trigger.md"
    )


def test_triggers_are_recognised():
    """The search finds triggers at all, and every one satisfies the protocol by its class."""
    found = {kind.__name__ for kind in trigger_classes()}
    assert {"Webhook", "Kafka", "S3", "Directory", "Cron", "DriftAlert", "DriftMonitor"} <= found
    assert "RunState" not in found and "KafkaSink" not in found
    assert all(inspect.iscoroutinefunction(kind.listen) for kind in trigger_classes()), Trigger
