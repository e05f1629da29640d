"""A checkpoint as files: states of plain data with arrays and tensors in them, copies of files and folders, and their sums.

    head         JSON: step, attempt, form, and size and sum of every other file; written last
    state        the plain part (plain.py), each array or tensor in it left out; or bytes as they are
    arrays.npz   numpy arrays, in the order met; read without pickle
    tensors.pt   torch tensors, by torch.save; read with weights_only
    files/NAME   a copy of a file or folder

`checkpoint.py` decides where and when. numpy and torch are used only when the user's own state brings them in; nothing that is
read here can run code. Next room: `plain.py`.
"""

import hashlib
import importlib
import json
import os
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import orjson

from eventflow.core.errors import NotStorable, UsageError
from eventflow.serialization.tagged_json import decode_tagged, encode_plain, type_name

SizeCheck = Callable[[int], None]
"""Asked with the bytes to come, before any is written; raises when they are too many."""

STATE_PATH = "checkpoint: state"

_type_of: Callable[[Any], Callable[[Any], Any]] = type  # typed, where `type(value)` is not


class Manifest(msgspec.Struct):
    """What a checkpoint says of itself. `leaves`: by their number among all that is no container, what stands there."""

    form: str
    step: int = 0
    attempt: int = 0
    arguments: str | None = None
    leaves: dict[int, str] = {}
    name: str = ""
    files: dict[str, tuple[int, str]] = {}


# --------------------------------------------------------------------------- states


def encode(state: Any, folder: Path, room: SizeCheck) -> Manifest:
    """Writes a state into an empty folder. NotStorable names the path to what cannot be kept."""
    if type(state) is bytes:
        room(len(state))
        (folder / "state").write_bytes(state)
        return Manifest("bytes")
    split = _Extractor()
    try:
        tree = split.extract(state, STATE_PATH)
    except RecursionError:
        raise NotStorable(STATE_PATH, f"{type_name(state)} nested too deep") from None
    form, data = encode_plain(tree, STATE_PATH)
    room(len(data) + split.size)
    (folder / "state").write_bytes(data)
    if split.arrays:
        importlib.import_module("numpy").savez(folder / "arrays.npz", *split.arrays)
    if split.tensors:
        importlib.import_module("torch").save(split.tensors, folder / "tensors.pt")
    return Manifest(form, leaves=split.leaves)


def decode(folder: Path, head: Manifest) -> Any:
    """The state of `encode`, or the Path that `encode_path` copied to."""
    if head.form == "path":
        return folder / "files" / head.name
    data = (folder / "state").read_bytes()
    if head.form == "bytes":
        return data
    tree = orjson.loads(data) if head.form == "json" else decode_tagged(data)
    if not head.leaves:
        return tree
    return _Restorer(head.leaves, _arrays(folder), _tensors(folder)).restore(tree)


class _Extractor:
    """Takes a state apart: the plain tree, with None where an array or tensor was, and those in the order met."""

    def __init__(self) -> None:
        self.arrays: list[Any] = []
        self.tensors: list[Any] = []
        self.leaves: dict[int, str] = {}
        self.size = self._count = 0
        self._numpy: Any = sys.modules.get("numpy")  # a state with arrays in it has imported it
        self._torch: Any = sys.modules.get("torch")

    def extract(self, value: Any, path: str) -> Any:
        kind = _type_of(value)
        if kind is dict or kind is OrderedDict:
            return {
                key: self.extract(member, f"{path}[{key!r}]")
                for key, member in cast(dict[Any, Any], value).items()
            }
        if kind is list or kind is tuple:
            return kind(
                self.extract(member, f"{path}[{index}]")
                for index, member in enumerate(cast(list[Any], value))
            )
        number, self._count = self._count, self._count + 1
        numpy, torch = self._numpy, self._torch
        if numpy is not None and (
            kind is numpy.ndarray or isinstance(value, numpy.generic | numpy.memmap)
        ):
            return self._extract_array(number, value, path)
        if torch is not None and isinstance(value, torch.Tensor):
            self.leaves[number] = "tensor"
            self.size += value.numel() * value.element_size()
            self.tensors.append(
                value.detach().clone()
            )  # of a view torch.save would keep all that it looks at
            return None
        return value

    def _extract_array(self, number: int, value: Any, path: str) -> None:
        if value.dtype.hasobject:
            raise NotStorable(path, "numpy array of Python objects")
        self.leaves[number] = "scalar" if isinstance(value, self._numpy.generic) else "array"
        self.size += value.nbytes
        self.arrays.append(value)


class _Restorer:
    """Puts back what `_Split` took out, walking as it walked."""

    def __init__(self, leaves: dict[int, str], arrays: Any, tensors: Any) -> None:
        self._leaves, self._count = leaves, 0
        self._sources: dict[str, Any] = {"array": iter(arrays), "tensor": iter(tensors)}

    def restore(self, value: Any) -> Any:
        kind = _type_of(value)
        if kind is dict:
            return {
                key: self.restore(member) for key, member in cast(dict[Any, Any], value).items()
            }
        if kind is list or kind is tuple:
            return kind(self.restore(member) for member in cast(list[Any], value))
        found = self._leaves.get(self._count)
        self._count += 1
        if found is None:
            return value
        return next(self._sources["array"])[()] if found == "scalar" else next(self._sources[found])


def _arrays(folder: Path) -> Any:
    path = folder / "arrays.npz"
    if not path.exists():
        return []
    with _library("numpy").load(path, allow_pickle=False) as archive:
        return [archive[f"arr_{index}"] for index in range(len(archive.files))]


def _tensors(folder: Path) -> Any:
    path = folder / "tensors.pt"
    return (
        _library("torch").load(path, map_location="cpu", weights_only=True) if path.exists() else []
    )


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(
            f"the checkpoint holds what {name} made, and {name} is not installed here; install it"
        ) from None


# --------------------------------------------------------------------------- files and folders


def encode_path(path: Path, folder: Path, room: SizeCheck) -> Manifest:
    """Copies a file, or a folder with all in it, links followed."""
    name = path.resolve().name
    if not name or not (path.is_dir() or path.is_file()):
        raise UsageError(
            f"save_file({str(path)!r}): expected a file or a folder, found "
            f"{'no such' if path.exists() else 'none'}"
        )
    room(sum(each.stat().st_size for each in [path, *path.rglob("*")] if each.is_file()))
    target = folder / "files" / name
    target.parent.mkdir()
    if path.is_dir():
        shutil.copytree(path, target, copy_function=shutil.copyfile)
    else:
        shutil.copyfile(path, target)
    return Manifest("path", name=name)


# --------------------------------------------------------------------------- sums


def write_manifest(folder: Path, head: Manifest) -> None:
    """Makes the folder durable and writes its head."""
    head.files = {}
    for where, _, names in os.walk(folder):
        for name in names:
            path = Path(where, name)
            head.files[str(path.relative_to(folder))] = (path.stat().st_size, _digest(path))
    # The standard library's: a file may have a name that is no UTF-8.
    (folder / "head").write_text(json.dumps(msgspec.to_builtins(head, str_keys=True)))
    for where, _, names in os.walk(folder, topdown=False):
        for name in names:
            fsync_path(Path(where, name))
        fsync_path(Path(where))


def read_verified(folder: Path) -> Manifest:
    """The head of a checkpoint whose files are those that were saved; ValueError or OSError says what is wrong."""
    head = msgspec.convert(json.loads((folder / "head").read_text()), Manifest, strict=False)
    for name, (size, digest) in head.files.items():
        path = folder / name
        if path.stat().st_size != size or _digest(path) != digest:
            raise ValueError(f"{name} is not as it was saved")
    return head


def step_of(folder: Path) -> int:
    """The step of a checkpoint, whatever its sums; -1 if even that cannot be read."""
    try:
        return int(json.loads((folder / "head").read_text())["step"])
    except (OSError, ValueError, LookupError):
        return -1


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def fsync_path(path: Path) -> None:
    """fsync of a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
