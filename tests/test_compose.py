"""compose.yaml: valid, closed to the outside, and in step with the examples it serves."""

import ast
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parent.parent
FILE = ROOT / "compose.yaml"
ADDRESSES = ("KAFKA_BOOTSTRAP_SERVERS", "S3_ENDPOINT_URL", "DATABASE_URL")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def published(service: dict[str, Any]) -> list[tuple[str, int, int]]:
    """`(address, host port, container port)` of each published port."""
    split = [port.split(":") for port in service.get("ports", [])]
    assert all(len(parts) == 3 for parts in split), "each port says address:host:container"
    return [(address, int(outer), int(inner)) for address, outer, inner in split]


def listening(service: dict[str, Any]) -> set[int]:
    """The ports a service was told to listen on: in its command, or in its environment."""
    words = " ".join([*service.get("command", []), *service.get("environment", {}).values()])
    return {int(port) for port in re.findall(r"(?<=[: ])\d{4}\b", words)}


def test_it_follows_the_compose_specification(compose: dict[str, Any]):
    """The file is valid under the Compose Specification's own JSON schema."""
    schema = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    jsonschema.validate(compose, json.loads(schema.read_text()))


def test_nothing_is_published_beyond_loopback(compose: dict[str, Any]):
    """Every published port is bound to 127.0.0.1, so that no default password is reachable from
    another machine.
    """
    for name, service in compose["services"].items():
        assert {address for address, _, _ in published(service)} == {"127.0.0.1"}, name


def test_every_service_has_a_health_check(compose: dict[str, Any]):
    """Every service has a health check, and the app waits for those of its parts."""
    services = compose["services"]
    assert all(service["healthcheck"]["test"][0] == "CMD" for service in services.values())
    waits = services["app"]["depends_on"]
    assert waits == {name: {"condition": "service_healthy"} for name in services if name != "app"}


@pytest.mark.parametrize("name", ADDRESSES)
def test_the_app_gets_the_addresses_of_its_services(compose: dict[str, Any], name: str):
    """Each address in the app's environment names a service of the file, at a port that the service
    listens on.
    """
    address = compose["services"]["app"]["environment"][name]
    found = re.search(r"(\w+):(\d+)(?:/\w*)?$", address)
    assert found, address
    service = compose["services"][found[1]]
    defaults = {"postgres": 5432, "minio": 9000}
    assert int(found[2]) in listening(service) | {defaults.get(found[1])}


def test_every_published_port_is_listened_on(compose: dict[str, Any]):
    """No published port leads nowhere: the service was told to listen on it, or it is the image's
    own.
    """
    own = {"postgres": {5432}, "minio": {9000}}
    for name, service in compose["services"].items():
        inner = {port for _, _, port in published(service)}
        assert inner <= listening(service) | own.get(name, set()), name


def test_the_examples_find_their_environment(compose: dict[str, Any]):
    """Every variable that an example reads is set for the app, or handed through from the user."""
    given = set(compose["services"]["app"]["environment"])
    asked = {name for path in (ROOT / "examples").glob("*.py") for name in environment_names(path)}
    assert asked and asked <= given


def environment_names(path: Path) -> set[str]:
    """Literal names in `env("NAME")`, `os.environ["NAME"]`, `os.environ.get("NAME")` and
    `os.getenv("NAME")`.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if ast.unparse(
                func
            ).endswith(("env", "environ.get", "getenv")):
                names.add(name)
            case ast.Subscript(value=value, slice=ast.Constant(value=str(name))) if (
                ast.unparse(value) == "os.environ"
            ):
                names.add(name)
    return names


def test_the_app_serves_a_file_that_exists(compose: dict[str, Any]):
    """The default target is an example of this repository, and the Dockerfile copies it in."""
    target = re.search(
        r"EVENTFLOW_TARGET:-/app/([^}]+)", " ".join(compose["services"]["app"]["command"])
    )
    assert target and (ROOT / target[1]).is_file()
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "WORKDIR /app\n" in dockerfile and "COPY examples ./examples\n" in dockerfile
