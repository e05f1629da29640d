"""A model registry in a folder, and in MLflow when MLFLOW_TRACKING_URI is set: where
examples/drift_retrain.py registers.

    python examples/model_registry.py digits

Watch: the versions in models/digits/, and which of them is the champion. A model is registered
under a key, and the same key again is the same version: a task that is killed between registering
and being recorded registers nothing twice.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx2

MODELS = Path("models")


def register(name: str, model: Any, scores: dict[str, float], key: str) -> str:
    """Registers a version and makes it the champion; returns its name. Again with the same key: the
    same version.
    """
    version = hashlib.sha256(key.encode()).hexdigest()[:12]
    folder = MODELS / Path(name).name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / f"{version}.json").exists():
        _write(
            folder / f"{version}.json", json.dumps({"model": model, "scores": scores, "key": key})
        )
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        _to_mlflow(uri, name, version, folder / f"{version}.json", scores)
    _write(folder / "champion", version)
    return version


def champion(name: str) -> Any:
    """The model in service; None when there is none yet."""
    folder = MODELS / Path(name).name
    if not (folder / "champion").exists():
        return None
    return json.loads((folder / f"{(folder / 'champion').read_text()}.json").read_text())["model"]


def _write(path: Path, text: str) -> None:
    """The file comes into its place whole and durable, or not at all."""
    with path.with_suffix(".part").open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".part").replace(path)


def _to_mlflow(uri: str, name: str, version: str, file: Path, scores: dict[str, float]) -> None:
    """A run with the scores and the file, and a model version tagged with ours, which is how it is
    known again.
    """
    tags = [{"key": "eventflow.version", "value": version}]
    with httpx2.Client(base_url=f"{uri}/api/2.0/mlflow", timeout=30) as api:
        known = (
            api.get("/model-versions/search", params={"filter": f"name='{name}'"})
            .raise_for_status()
            .json()
        )
        if any(
            tag in each.get("tags", []) for each in known.get("model_versions", []) for tag in tags
        ):
            return
        api.post("/registered-models/create", json={"name": name})  # 400 when it is there already
        run = (
            api.post("/runs/create", json={"experiment_id": "0", "tags": tags})
            .raise_for_status()
            .json()["run"]["info"]
        )
        metrics = [
            {"key": metric, "value": value, "timestamp": 0, "step": 0}
            for metric, value in scores.items()
        ]
        api.post(
            "/runs/log-batch", json={"run_id": run["run_id"], "metrics": metrics}
        ).raise_for_status()
        place = f"{uri}/api/2.0/mlflow-artifacts/artifacts/0/{run['run_id']}/artifacts/{file.name}"
        api.put(place, content=file.read_bytes()).raise_for_status()
        made = {
            "name": name,
            "source": f"{run['artifact_uri']}/{file.name}",
            "run_id": run["run_id"],
            "tags": tags,
        }
        api.post("/model-versions/create", json=made).raise_for_status()


if __name__ == "__main__":
    for path in sorted((MODELS / sys.argv[1]).glob("*.json")):
        print(path.stem, json.loads(path.read_text())["scores"])
    print("champion:", (MODELS / sys.argv[1] / "champion").read_text())
