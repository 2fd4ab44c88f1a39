"""Classification data for bilinear networks: scikit-learn's digits, or arrays `x` and `y` from a
file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.errors import InputError
from assay.io.files import load_tensors

DIGITS_TRAIN = 1297


@dataclass(frozen=True)
class Data:
    """A data set in two parts, float32 inputs and classes 0, 1, ...; `names` are the labels as they
    came.

    `image` is (height, width) or (channels, height, width) where the inputs are images, else None.
    """

    train_x: Float[Tensor, "train inputs"]
    train_y: Int[Tensor, " train"]
    test_x: Float[Tensor, "test inputs"]
    test_y: Int[Tensor, " test"]
    names: tuple[str, ...]
    image: tuple[int, ...] | None = None

    @property
    def inputs(self) -> int:
        return self.train_x.shape[1]

    @property
    def classes(self) -> int:
        return len(self.names)


def load_digits(seed: int = 0) -> Data:
    """Return scikit-learn's 8 x 8 digits in [0, 1], 1297 to train on and 500 to test on, in an
    order drawn from `seed`.
    """
    from sklearn.datasets import load_digits as load

    x, y = load(return_X_y=True)
    return split_data(
        torch.from_numpy(x / 16).reshape(-1, 8, 8),
        torch.from_numpy(y),
        train=DIGITS_TRAIN / len(y),
        seed=seed,
    )


def load_arrays(path: Path | str, *, train: float = 0.75, seed: int = 0) -> Data:
    """Return the data in an npz or safetensors file with `x` (examples, ...) and integer `y`
    (examples,).

    Raises InputError when an array is missing, empty, of another shape, not finite, or has fewer
    than two classes."""
    arrays = load_tensors(path)
    missing = [name for name in ("x", "y") if name not in arrays]
    if missing:
        held = ", ".join(sorted(arrays)) or "nothing"
        raise InputError(
            f"{path} needs arrays x and y; {' and '.join(missing)} missing (it holds {held})"
        )
    return split_data(arrays["x"], arrays["y"], train=train, seed=seed, where=str(path))


def split_data(
    x: Tensor, y: Tensor, *, train: float = 0.75, seed: int = 0, where: str = "data"
) -> Data:
    """Check a data set, scale it and split it at random.

    Images (examples, height, width) or (examples, channels, height, width) are divided by the
    largest absolute entry. The columns of a table (examples, columns) are centred and scaled on the
    training part, and a constant column is added, as the network has no biases.

    Raises InputError as `load_arrays`, and when a part of the split would be empty or a class has
    no training example."""
    if x.ndim < 2 or x.ndim > 4 or not x.numel():
        raise InputError(
            f"{where}: x must be (examples, columns) or images, and not empty; got shape"
            f" {tuple(x.shape)}"
        )
    if x.is_complex():
        raise InputError(f"{where}: x must be real, got {x.dtype}")
    y = _integers(y, len(x), where)
    if not bool(torch.isfinite(x).all()):
        raise InputError(f"{where}: x holds NaN or infinite values")
    found, labels = y.unique(return_inverse=True)
    if len(found) < 2:
        raise InputError(
            f"{where}: y holds one class only ({found[0].item()}); at least two are needed"
        )
    if not 0 < train < 1:
        raise InputError(f"train must be a share between 0 and 1, got {train}")
    count = round(train * len(x))
    if not 0 < count < len(x):
        raise InputError(
            f"{where}: {len(x)} examples cannot be split with a training share of {train}"
        )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, labels = x.double()[order], labels[order]
    absent = set(range(len(found))) - set(labels[:count].tolist())
    if absent:
        raise InputError(
            f"{where}: class {found[min(absent)].item()} has no training example; give more data or"
            " another seed"
        )
    if x.ndim == 2:
        mean, deviation = x[:count].mean(0), x[:count].std(0, correction=0)
        x = (x - mean) / torch.where(
            deviation > 1e-9 * (1 + mean.abs()), deviation, torch.ones_like(deviation)
        )
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        image = None
    else:
        image = tuple(x.shape[1:])
        x = x.flatten(1) / x[:count].abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    x = x.float()
    return Data(
        x[:count],
        labels[:count],
        x[count:],
        labels[count:],
        tuple(str(name) for name in found.tolist()),
        image,
    )


def _integers(y: Tensor, examples: int, where: str) -> Tensor:
    if y.shape != (examples,):
        raise InputError(
            f"{where}: y must be ({examples},), one class per example of x; got shape"
            f" {tuple(y.shape)}"
        )
    if y.is_complex() or (
        y.is_floating_point() and not bool((torch.isfinite(y) & (y == y.round())).all())
    ):
        raise InputError(
            f"{where}: y must hold integer classes, got {y.dtype} values that are not whole numbers"
        )
    return y.long()
