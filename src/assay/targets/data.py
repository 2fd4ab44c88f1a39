"""Classification data for bilinear networks: scikit-learn's digits, or arrays `x` and `y` from a
file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.errors import InputError, unknown
from assay.io.files import load_tensors

DIGITS_TRAIN = 1297
CHANNELS = 4
"""The most colours that an axis of images is taken to hold without being told."""

Layout = Literal["auto", "channels-first", "channels-last"]


@dataclass(frozen=True)
class Scaling:
    """How inputs are scaled, so that later ones can be scaled alike: `(x - centre) / scale`, over
    the columns of a table, to which a constant column is added, or over all entries of images of
    shape `image`.
    """

    centre: Float[Tensor, " columns"]
    scale: Float[Tensor, " columns"]
    image: tuple[int, ...] | None
    layout: Layout = "auto"

    def apply(self, x: Tensor, where: str = "data") -> Float[Tensor, "examples inputs"]:
        """Return inputs as the network reads them, in float32. Raises InputError when their shape
        is another one, or they hold NaN.
        """
        x = _checked_inputs(x, where)
        if self.image is not None:
            x = _channels_first(x, self.layout, where)
        expected = self.image or tuple(self.centre.shape)
        if tuple(x.shape[1:]) != expected:
            raise InputError(
                f"{where}: the network was trained on inputs of shape {expected}, got"
                f" {tuple(x.shape[1:])}"
            )
        x = (x.double().flatten(1) - self.centre) / self.scale
        if self.image is None:
            x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        return x.float()


@dataclass(frozen=True)
class Data:
    """A data set in two parts, float32 inputs and classes 0, 1, ...; `names` are the labels as they
    came.

    `image` is (height, width) or (channels, height, width) where the inputs are images, else None.
    `repeated` counts the inputs that are copies of another one; copies are in one part together.
    """

    train_x: Float[Tensor, "train inputs"]
    train_y: Int[Tensor, " train"]
    test_x: Float[Tensor, "test inputs"]
    test_y: Int[Tensor, " test"]
    names: tuple[str, ...]
    scaling: Scaling
    image: tuple[int, ...] | None = None
    repeated: int = 0

    @property
    def inputs(self) -> int:
        return self.train_x.shape[1]

    @property
    def classes(self) -> int:
        return len(self.names)

    def both_parts(self) -> tuple[Tensor, Tensor]:
        """Return all inputs and their classes, the training part first."""
        return (
            torch.cat([self.train_x, self.test_x]),
            torch.cat([self.train_y, self.test_y]),
        )

    def distinct_test(self, most: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the test part without copies, at most `most` inputs of it: what is measured on
        copies of one input is one measurement.
        """
        groups = group_inputs(self.test_x)
        first = torch.ones(len(groups), dtype=torch.bool)
        first[1:] = groups[1:] > groups.cummax(0).values[:-1]
        chosen = first.nonzero()[:most, 0]
        return self.test_x[chosen], self.test_y[chosen]

    def without_test(self, share: float = 0.2, *, seed: int = 0) -> Data:
        """Return the training part alone, split again: choices are made on its test part, which is
        the validation part, and the test part of this data set stays unread.
        """
        order, count = _grouped_order(self.train_x, 1 - share, seed, "the training part")
        x, y = self.train_x[order], self.train_y[order]
        return replace(
            self, train_x=x[:count], train_y=y[:count], test_x=x[count:], test_y=y[count:]
        )


def load_digits(seed: int = 0) -> Data:
    """Return scikit-learn's 8 x 8 digits in [0, 1], 1297 to train on and 500 to test on, in an
    order drawn from `seed`.
    """
    from sklearn.datasets import load_digits as load

    x, y = load(return_X_y=True)
    return split_data(
        torch.from_numpy(x).reshape(-1, 8, 8),
        torch.from_numpy(y),
        train=DIGITS_TRAIN / len(y),
        seed=seed,
    )


def load_arrays(
    path: Path | str, *, train: float = 0.75, seed: int = 0, layout: Layout = "auto"
) -> Data:
    """Return the data in an npz or safetensors file with `x` (examples, ...) and integer `y`
    (examples,), see `split_data`.

    Raises InputError when an array is missing, empty, of another shape, not finite, or has fewer
    than two classes."""
    arrays = _arrays(path, ("x", "y"))
    return split_data(
        arrays["x"], arrays["y"], train=train, seed=seed, layout=layout, where=str(path)
    )


def load_new(path: Path | str, data: Data) -> tuple[Tensor, Tensor]:
    """Return inputs and classes of another file, scaled and named as those of `data`.

    Raises InputError as `load_arrays`, and for a label that `data` does not have."""
    arrays = _arrays(path, ("x", "y"))
    x = data.scaling.apply(arrays["x"], str(path))
    labels = _integers(arrays["y"], len(x), str(path)).tolist()
    places = {name: place for place, name in enumerate(data.names)}
    strange = sorted({label for label in labels if str(label) not in places})
    if strange:
        raise InputError(
            f"{path}: the network has no class {strange[0]}; its classes are"
            f" {', '.join(data.names)}"
        )
    return x, torch.tensor([places[str(label)] for label in labels])


def split_data(
    x: Tensor,
    y: Tensor,
    *,
    train: float = 0.75,
    seed: int = 0,
    layout: Layout = "auto",
    where: str = "data",
) -> Data:
    """Check a data set, scale it and split it at random.

    Images (examples, height, width), (examples, channels, height, width) or, with the layout
    "channels-last", (examples, height, width, channels) are divided by the largest absolute entry
    of the training part; with the layout "auto" the axis of at most 4 entries holds the channels.
    The columns of a table (examples, columns) are centred and scaled on the training part, and a
    constant column is added, as the network has no biases. Copies of one input stay together.

    Raises InputError as `load_arrays`, when the layout cannot be told, and when a part of the split
    would be empty or a class has no training example."""
    x = _checked_inputs(x, where)
    y = _integers(y, len(x), where)
    found, labels = y.unique(return_inverse=True)
    if len(found) < 2:
        raise InputError(
            f"{where}: y holds one class only ({found[0].item()}); at least two are needed"
        )
    if not 0 < train < 1:
        raise InputError(f"train must be a share between 0 and 1, got {train}")
    image = None if x.ndim == 2 else tuple(_channels_first(x, layout, where).shape[1:])
    order, count = _grouped_order(x, train, seed, where)
    x, labels = x.double()[order], labels[order]
    absent = set(range(len(found))) - set(labels[:count].tolist())
    if absent:
        raise InputError(
            f"{where}: class {found[min(absent)].item()} has no training example; give more data or"
            " another seed"
        )
    scaling = _scaling(x[:count], image, layout)
    scaled = scaling.apply(x, where)
    return Data(
        scaled[:count],
        labels[:count],
        scaled[count:],
        labels[count:],
        tuple(str(name) for name in found.tolist()),
        scaling,
        image,
        len(x) - int(group_inputs(x).max()) - 1,
    )


def group_inputs(x: Tensor) -> Int[Tensor, " examples"]:
    """Number inputs by their content, in the order of first appearance: copies share a number.

    Contents are compared by the SHA-256 of their bytes, zeros of either sign alike."""
    seen: dict[bytes, int] = {}
    rows = (x.flatten(1) + 0.0).contiguous().cpu().numpy()
    return torch.tensor(
        [seen.setdefault(hashlib.sha256(row.tobytes()).digest(), len(seen)) for row in rows]
    )


def _grouped_order(x: Tensor, share: float, seed: int, where: str) -> tuple[Tensor, int]:
    """Return a random order of inputs, copies next to each other, and how many come before the
    cut.
    """
    groups = group_inputs(x)
    distinct = int(groups.max()) + 1
    count = round(share * distinct)
    if not 0 < count < distinct:
        raise InputError(
            f"{where}: {distinct} distinct examples cannot be split with a training share of"
            f" {share:.3g}"
        )
    shuffled = torch.randperm(distinct, generator=torch.Generator().manual_seed(seed))
    place = shuffled.argsort()[groups]
    return place.argsort(stable=True), int((place < count).sum())


def _scaling(x: Tensor, image: tuple[int, ...] | None, layout: Layout) -> Scaling:
    if image is not None:
        largest = x.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        return Scaling(torch.zeros(1, dtype=x.dtype), largest.reshape(1), image, layout)
    mean, deviation = x.mean(0), x.std(0, correction=0)
    flat = deviation <= 1e-9 * (1 + mean.abs())
    return Scaling(mean, torch.where(flat, torch.ones_like(deviation), deviation), None)


def _channels_first(x: Tensor, layout: Layout, where: str) -> Tensor:
    """Return images (examples, height, width) or (examples, channels, height, width)."""
    if layout not in ("auto", "channels-first", "channels-last"):
        raise unknown("layout", str(layout), ("auto", "channels-first", "channels-last"))
    if x.ndim < 4:
        return x
    first, last = x.shape[1] <= CHANNELS, x.shape[3] <= CHANNELS
    if layout == "auto" and first == last:
        raise InputError(
            f"{where}: images of shape {tuple(x.shape[1:])} may be (channels, height, width) or"
            " (height, width, channels); say data.layout=channels-first or channels-last"
        )
    return x.permute(0, 3, 1, 2) if layout == "channels-last" or (layout == "auto" and last) else x


def _arrays(path: Path | str, wanted: tuple[str, ...]) -> Mapping[str, Tensor]:
    arrays = load_tensors(path)
    missing = [name for name in wanted if name not in arrays]
    if missing:
        held = ", ".join(sorted(arrays)) or "nothing"
        raise InputError(
            f"{path} needs arrays x and y; {' and '.join(missing)} missing (it holds {held})"
        )
    return arrays


def _checked_inputs(x: Tensor, where: str) -> Tensor:
    if x.ndim < 2 or x.ndim > 4 or not x.numel():
        raise InputError(
            f"{where}: x must be (examples, columns) or images, and not empty; got shape"
            f" {tuple(x.shape)}"
        )
    if x.is_complex():
        raise InputError(f"{where}: x must be real, got {x.dtype}")
    if not bool(torch.isfinite(x).all()):
        raise InputError(f"{where}: x holds NaN or infinite values")
    return x


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
