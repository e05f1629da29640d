"""A model registry in a folder, and in MLflow when MLFLOW_TRACKING_URI is set, for
examples/drift_retrain.py.

    python examples/model_registry.py digits

Watch: the versions in models/digits/ and the champion among them. The same key registers the same
version, so a task that is killed after it registered a model and runs again registers it once.
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
    """Register a version, make it the champion, and return its name. Idempotent by `key`."""
    version = hashlib.sha256(key.encode()).hexdigest()[:12]
    folder = MODELS / Path(name).name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / f"{version}.json").exists():
        text = json.dumps({"model": model, "scores": scores, "key": key})
        _write(folder / f"{version}.json", text)
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        _to_mlflow(uri, name, version, folder / f"{version}.json", scores)
    _write(folder / "champion", version)
    return version


def champion(name: str) -> Any:
    """The model in use; None if there is none yet."""
    folder = MODELS / Path(name).name
    if not (folder / "champion").exists():
        return None
    return json.loads((folder / f"{(folder / 'champion').read_text()}.json").read_text())["model"]


def _write(path: Path, text: str) -> None:
    """Write atomically and durably."""
    with path.with_suffix(".part").open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".part").replace(path)


def _to_mlflow(uri: str, name: str, version: str, file: Path, scores: dict[str, float]) -> None:
    """A run with the scores and the file, and a model version that carries ours as a tag."""
    tag = {"key": "eventflow.version", "value": version}
    with httpx2.Client(base_url=f"{uri}/api/2.0/mlflow", timeout=30) as api:
        found = api.get("/model-versions/search", params={"filter": f"name='{name}'"})
        versions = found.raise_for_status().json().get("model_versions", [])
        if any(tag in each.get("tags", []) for each in versions):
            return
        api.post("/registered-models/create", json={"name": name})  # 400 when it exists
        made = api.post("/runs/create", json={"experiment_id": "0", "tags": [tag]})
        run = made.raise_for_status().json()["run"]["info"]
        ident, folder = run["run_id"], run["artifact_uri"]
        metrics = [{"key": k, "value": v, "timestamp": 0, "step": 0} for k, v in scores.items()]
        batch = {"run_id": ident, "metrics": metrics}
        api.post("/runs/log-batch", json=batch).raise_for_status()
        url = f"{uri}/api/2.0/mlflow-artifacts/artifacts/0/{ident}/artifacts/{file.name}"
        api.put(url, content=file.read_bytes()).raise_for_status()
        model = {"name": name, "source": f"{folder}/{file.name}", "run_id": ident, "tags": [tag]}
        api.post("/model-versions/create", json=model).raise_for_status()


if __name__ == "__main__":
    for path in sorted((MODELS / sys.argv[1]).glob("*.json")):
        print(path.stem, json.loads(path.read_text())["scores"])
    print("champion:", (MODELS / sys.argv[1] / "champion").read_text())
