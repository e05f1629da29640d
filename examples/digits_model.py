"""Handwritten digits of scikit-learn and a classifier for them: what examples/drift_retrain.py
trains, epoch by epoch.

    python examples/digits_model.py 900
    python examples/digits_model.py 1797

Watch: so many digits "have arrived" in data/digits.npz, and ten epochs of SGD on them, with loss,
gradient and accuracy. From number 900 on the scanner is askew (every picture is a pixel to the
right): a model trained before that is bad at the rest.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

DATA = Path("data/digits.npz")
ASKEW = 900
Model = dict[str, np.ndarray]


def arrive(count: int) -> None:
    """The first `count` digits are there, as whoever collects them would write them."""
    pictures, labels = load_digits(return_X_y=True)
    pictures[ASKEW:] = np.roll(pictures[ASKEW:].reshape(-1, 8, 8), 1, axis=2).reshape(-1, 64)
    DATA.parent.mkdir(exist_ok=True)
    np.savez(DATA.with_suffix(".part.npz"), x=pictures[:count] / 16, y=labels[:count])
    DATA.with_suffix(".part.npz").replace(DATA)  # whole, or not at all: a training may be reading


def arrived(*, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Every fifth of the newest 600 digits is held out, the others of all that came are trained
    on.
    """
    with np.load(DATA) as data:
        x, y = data["x"], data["y"]
    number = np.arange(len(y))
    held = (number % 5 == 0) & (number >= len(y) - 600)
    return (x[held], y[held]) if held_out else (x[~held], y[~held])


def fresh() -> Model:
    return {"w": np.zeros((64, 10)), "b": np.zeros(10)}


def train_epoch(
    model: Model, x: np.ndarray, y: np.ndarray, epoch: int, rate: float = 0.5
) -> tuple[Model, float, float]:
    """The model after one epoch of softmax regression by SGD, the mean loss, and the largest norm
    of a gradient.

    The same epoch on the same data gives the same model, so that a training that was killed ends as
    one that was not.
    """
    w, b, losses, norms = model["w"].copy(), model["b"].copy(), [], []
    for batch in np.array_split(
        np.random.default_rng(epoch).permutation(len(y)), max(1, len(y) // 32)
    ):
        scores = x[batch] @ w + b
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        losses.append(-np.log(shares[np.arange(len(batch)), y[batch]]).mean())
        shares[np.arange(len(batch)), y[batch]] -= 1
        down, bias = x[batch].T @ shares / len(batch), shares.mean(axis=0)
        w, b = w - rate * down, b - rate * bias
        norms.append(np.hypot(np.linalg.norm(down), np.linalg.norm(bias)))
    return {"w": w, "b": b}, float(np.mean(losses)), float(np.max(norms))


def accuracy(model: Mapping[str, Any], x: np.ndarray, y: np.ndarray) -> float:
    return float(((x @ np.array(model["w"]) + np.array(model["b"])).argmax(axis=1) == y).mean())


if __name__ == "__main__":
    arrive(int(sys.argv[1]))
    model = fresh()
    for epoch in range(1, 11):
        model, loss, norm = train_epoch(model, *arrived(held_out=False), epoch)
        print(
            f"epoch {epoch}: loss {loss:.3f}, gradient {norm:.2f}, accuracy {accuracy(model, *arrived(held_out=True)):.3f}"
        )
