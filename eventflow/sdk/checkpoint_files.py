"""The file format of a checkpoint, which is a directory.

    head         the manifest, JSON: step, attempt, form, size and checksum of every other file
    state        the state without its arrays and tensors (tagged JSON), or bytes as they are
    arrays.npz   numpy arrays, in the order of traversal; read without pickle
    tensors.pt   torch tensors, by torch.save; read with weights_only
    files/NAME   a copy of a file or directory

`head` is written last. Called by checkpoint.py, which decides where and when. numpy and torch are
imported only if the state contains their objects, tempfile and shutil, which take 2 ms, with the
first checkpoint. Reading a checkpoint cannot execute code.
"""

import hashlib
import importlib
import json
import os
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
"""Called with the number of bytes before any is written; raises if they are too many."""

STATE_PATH = "checkpoint: state"

_type_of: Callable[[Any], Callable[[Any], Any]] = type  # typed, where `type(value)` is not


class Manifest(msgspec.Struct):
    """The content of the file `head`. Its field names are part of the file format.

    `form`: how the file `state` is encoded. `leaves`: the position of each array, scalar or tensor
    among the values that are no containers, and which of the three it is. `name`: of a copied file.
    `files`: size and checksum by relative path.
    """

    form: str
    step: int = 0
    attempt: int = 0
    arguments: str | None = None
    leaves: dict[int, str] = {}
    name: str = ""
    files: dict[str, tuple[int, str]] = {}


# --------------------------------------------------------------------------- states


def encode(state: Any, folder: Path, check_size: SizeCheck) -> Manifest:
    """Write a state into an empty directory. NotStorable names the path to what has no encoding."""
    if type(state) is bytes:
        check_size(len(state))
        (folder / "state").write_bytes(state)
        return Manifest("bytes")
    split = _Extractor()
    try:
        tree = split.extract(state, STATE_PATH)
    except RecursionError:
        raise NotStorable(STATE_PATH, f"{type_name(state)} nested too deep") from None
    form, data = encode_plain(tree, STATE_PATH)
    check_size(len(data) + split.byte_count)
    (folder / "state").write_bytes(data)
    if split.arrays:
        importlib.import_module("numpy").savez(folder / "arrays.npz", *split.arrays)
    if split.tensors:
        importlib.import_module("torch").save(split.tensors, folder / "tensors.pt")
    return Manifest(form, leaves=split.leaves)


def decode(folder: Path, manifest: Manifest) -> Any:
    """The state that `encode` wrote, or the Path of the copy that `encode_path` made."""
    if manifest.form == "path":
        return folder / "files" / manifest.name
    data = (folder / "state").read_bytes()
    if manifest.form == "bytes":
        return data
    tree = orjson.loads(data) if manifest.form == "json" else decode_tagged(data)
    if not manifest.leaves:
        return tree
    return _Restorer(manifest.leaves, _arrays(folder), _tensors(folder)).restore(tree)


class _Extractor:
    """Separates the arrays and tensors of a state from the rest, in which they become None."""

    def __init__(self) -> None:
        self.arrays: list[Any] = []
        self.tensors: list[Any] = []
        self.leaves: dict[int, str] = {}
        self.byte_count: int = 0  # of the arrays and tensors
        self._count: int = 0  # values met that are no containers
        self._numpy: Any = sys.modules.get("numpy")  # imported if a state has arrays
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
        number = self._count
        self._count = self._count + 1
        numpy = self._numpy
        torch = self._torch
        if numpy is not None and (
            kind is numpy.ndarray or isinstance(value, numpy.generic | numpy.memmap)
        ):
            return self._extract_array(number, value, path)
        if torch is not None and isinstance(value, torch.Tensor):
            self.leaves[number] = "tensor"
            self.byte_count += value.numel() * value.element_size()
            # torch.save would store the whole storage of a view
            self.tensors.append(value.detach().clone())
            return None
        return value

    def _extract_array(self, number: int, value: Any, path: str) -> None:
        if value.dtype.hasobject:
            raise NotStorable(path, "numpy array of Python objects")
        self.leaves[number] = "scalar" if isinstance(value, self._numpy.generic) else "array"
        self.byte_count += value.nbytes
        self.arrays.append(value)


class _Restorer:
    """Puts the arrays and tensors back, in the order of `_Extractor`'s traversal."""

    def __init__(self, leaves: dict[int, str], arrays: Any, tensors: Any) -> None:
        self._leaves: dict[int, str] = leaves
        self._count: int = 0
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


# --------------------------------------------------------------------------- folders


def make_folder(parent: Path, prefix: str) -> Path:
    """A new, empty folder."""
    from tempfile import mkdtemp

    return Path(mkdtemp(prefix=prefix, dir=parent))


def remove_tree(folder: Path, *, ignore_errors: bool = False) -> None:
    """Removes a folder and all that is in it."""
    from shutil import rmtree

    rmtree(folder, ignore_errors=ignore_errors)


# --------------------------------------------------------------------------- copied files


def encode_path(path: Path, folder: Path, check_size: SizeCheck) -> Manifest:
    """Copy a file or directory into `folder`, following links."""
    from shutil import copyfile, copytree

    name = path.resolve().name
    if not name or not (path.is_dir() or path.is_file()):
        raise UsageError(
            f"save_file({str(path)!r}): expected a file or a folder, found "
            f"{'no such' if path.exists() else 'none'}"
        )
    check_size(sum(each.stat().st_size for each in [path, *path.rglob("*")] if each.is_file()))
    target = folder / "files" / name
    target.parent.mkdir()
    if path.is_dir():
        copytree(path, target, copy_function=copyfile)
    else:
        copyfile(path, target)
    return Manifest("path", name=name)


# --------------------------------------------------------------------------- manifests


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a directory and fsync all of it."""
    manifest.files = {}
    for where, _, names in os.walk(folder):
        for name in names:
            path = Path(where, name)
            manifest.files[str(path.relative_to(folder))] = (path.stat().st_size, _digest(path))
    # json, not orjson: a file name may be no UTF-8.
    (folder / "head").write_text(json.dumps(msgspec.to_builtins(manifest, str_keys=True)))
    for where, _, names in os.walk(folder, topdown=False):
        for name in names:
            fsync_path(Path(where, name))
        fsync_path(Path(where))


def read_verified(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files match it. Raises ValueError or OSError if not."""
    manifest = msgspec.convert(json.loads((folder / "head").read_text()), Manifest, strict=False)
    for name, (size, digest) in manifest.files.items():
        path = folder / name
        if path.stat().st_size != size or _digest(path) != digest:
            raise ValueError(f"{name} is not as it was saved")
    return manifest


def step_of(folder: Path) -> int:
    """The step of a checkpoint without verifying its files; -1 if it cannot be read."""
    try:
        return int(json.loads((folder / "head").read_text())["step"])
    except (OSError, ValueError, LookupError):
        return -1


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def fsync_path(path: Path) -> None:
    """fsync a file or directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
