"""Handwritten digits of scikit-learn, and the classifier that examples/drift_retrain.py trains.

    python examples/digits_model.py 900
    python examples/digits_model.py 1797

Watch: data/digits.npz with that many digits, and ten epochs of SGD on them, with loss, gradient and
accuracy. From number 900 on every picture is a pixel further right, so a model trained on the first
900 is bad at the rest.
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
    """Write the first `count` digits, as a collector would."""
    pictures, labels = load_digits(return_X_y=True)
    pictures[ASKEW:] = np.roll(pictures[ASKEW:].reshape(-1, 8, 8), 1, axis=2).reshape(-1, 64)
    DATA.parent.mkdir(exist_ok=True)
    np.savez(DATA.with_suffix(".part.npz"), x=pictures[:count] / 16, y=labels[:count])
    DATA.with_suffix(".part.npz").replace(DATA)  # atomic: a training may read it


def arrived(*, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """The digits to train on, or every fifth of the newest 600, which are held out."""
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
    """The model after one epoch of softmax regression by SGD, the mean loss and the largest norm of
    a gradient. The same for the same arguments, so that a killed training ends as any other.
    """
    w, b = model["w"].copy(), model["b"].copy()
    losses, norms = [], []
    order = np.random.default_rng(epoch).permutation(len(y))
    for batch in np.array_split(order, max(1, len(y) // 32)):
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
        score = accuracy(model, *arrived(held_out=True))
        print(f"epoch {epoch}: loss {loss:.3f}, gradient {norm:.2f}, accuracy {score:.3f}")
