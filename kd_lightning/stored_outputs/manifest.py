"""What stored outputs are the outputs of, and how they differ from what somebody wants to pair them with."""

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd_lightning.data.loaders import View
from kd_lightning.stored_outputs.replay import ReplayedViews, parts, untouched_generators
from kd_lightning.teachers import TeacherSource

CODE = 3
"""Raised with each change of the files' layout or of how augmentation is replayed."""
PROBES = 16
"""Samples that are looked at, spread over the data set, each in its first and its last view."""
_TOLERANCE = 1e-3  # of a sample's norm: another machine rounds otherwise
_REMEDY = {
    "teacher": "pass the teacher that wrote them",
    "code": "another version of kd_lightning wrote them in another layout: write them again",
    "length": "pass the data set that they were written for, whole and in its order",
    "transform": "augment as when they were written",
    "targets": "pass the data set that they were written for, whole and in its order",
    "samples": "pass the data set that they were written for, with the same augmentation and seed",
}


def fingerprint(
    views: ReplayedViews, count: int, teacher: TeacherSource | nn.Module | None, **settings: str | int | Sequence[str]
) -> dict[str, Any]:
    """Return what outputs depend on, as plain values: the teacher's weights, the data set, its transform, settings.

    Args:
        views: Of the data set.
        count: Of the views.
        teacher: None where it is not at hand: it is then not compared.
        settings: Such as seed and format.

    Raises:
        ValueError: For augmentation that cannot be replayed.
    """
    known = {} if teacher is None else {"teacher": teacher_hash(teacher)}
    return {
        "code": CODE,
        **known,
        "length": len(views),
        "transform": transforms(views.dataset),
        "seed": views.seed,
        "views": count,
        **settings,
        **_look(views, count),
    }


def check_can_be_replayed(dataset: Any, seed: int, count: int) -> None:
    """Raise ValueError for a data set some views of which are others each time, on the samples that are looked at."""
    _look(ReplayedViews(dataset, seed), count)


def check(stored: Mapping[str, Any], now: Mapping[str, Any], where: object) -> None:
    """Compare what both have.

    Raises:
        ValueError: Names each difference.
    """
    differences = []
    for name in (name for name in now if name in stored and not _same(name, stored[name], now[name])):
        remedy = f" ({_REMEDY[name]})" if name in _REMEDY else ""
        if name in ("samples", "targets"):
            keys = [key for key, value in now[name].items() if not _close(stored[name].get(key), value)]
            text = f"{name}: {len(keys)} of {len(now[name])} that were looked at, such as sample {keys[0]}"
        else:
            text = f"{name}: stored {_short(stored[name])}, now {_short(now[name])}"
        differences.append(text + remedy)
        if name == "length":
            break  # then the samples that were looked at are others, too
    if differences:
        raise ValueError(
            f"the outputs in {where} are of something else: {'; '.join(differences)}; or take another folder"
        )


def teacher_hash(source: TeacherSource | nn.Module) -> str:
    """Hash the weights and buffers of all networks that a source holds, wherever they are."""
    digest = hashlib.blake2b(digest_size=16)
    for network in _networks(source):
        digest.update(f"{type(network).__name__} ".encode())
        for key, value in sorted(network.state_dict().items()):
            if isinstance(value, Tensor):
                digest.update(f"{key} {tuple(value.shape)} {value.dtype} ".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def transforms(dataset: Any) -> list[str]:
    """Describe the transforms that a data set, and those inside it, say they have."""
    found = []
    for part in parts(dataset):
        inside = hasattr(part, "__getitem__") and hasattr(part, "__len__") and not isinstance(part, nn.Module)
        found += transforms(part) if inside else [describe(part)]
    return found


def describe(thing: Any) -> str:
    """Say what a transform is, the same in each process: its own repr, or its name and plain attributes."""
    if isinstance(thing, functools.partial):
        arguments = [describe(x) for x in thing.args] + [f"{k}={describe(v)}" for k, v in thing.keywords.items()]
        return f"{describe(thing.func)}({', '.join(arguments)})"
    if hasattr(thing, "__qualname__"):
        return f"{thing.__module__}.{thing.__qualname__}"
    if repr(thing) != object.__repr__(thing):
        return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))
    plain = {k: v for k, v in sorted(vars(thing).items()) if isinstance(v, int | float | str | bool | tuple)}
    values = [f"{k}={v!r}" for k, v in plain.items() if not k.startswith("_")]
    inside = [describe(part) for part in parts(thing)]
    return f"{type(thing).__qualname__}({', '.join(values + inside)})"


def _look(views: ReplayedViews, count: int) -> dict[str, dict[str, Any]]:
    probes = sorted({round(i * (len(views) - 1) / (PROBES - 1)) for i in range(PROBES)})
    samples, targets = {}, {}
    for view in sorted({0, count - 1}):
        keys = [View(sample, view) for sample in probes]
        first = _items(views, keys)
        with untouched_generators():
            torch.rand(3), np.random.rand()
            again = _items(views, keys[::-1])[::-1]
        for key, one, other in zip(keys, first, again, strict=True):
            name = f"{key.sample} view {view}"
            (samples[name], targets[name]), (second, _) = _prints(one), _prints(other)
            if not _close(samples[name], second):
                raise ValueError(
                    f"sample {key.sample} of {type(views.dataset).__name__} is another each time that view {view} of "
                    "it is asked for, expected augmentation that the global generators of torch, random and numpy "
                    "determine: draw from those, or give the transform a method set_random_seed(seed); then the data "
                    "set can show the student what the teacher saw"
                )
    return {"targets": targets, "samples": samples}


def _items(views: ReplayedViews, keys: list[View]) -> list[Any]:
    if not views.batched:
        found: list[Any] = views.__getitems__(keys)
        return found
    return [_map(views.__getitems__([key]), lambda x: x[0]) for key in keys]


def _prints(item: Any) -> tuple[list[float] | str, list[float] | str]:
    """Make short prints of a sample's inputs, and of the rest."""
    while isinstance(item, tuple) and hasattr(item, "_fields"):
        item = item[0]  # what WithIds puts around it
    if isinstance(item, tuple | list) and len(item) > 1:
        return sketch(item[0]), sketch(list(item[1:]))
    return sketch(item), ""


def sketch(thing: Any) -> list[float] | str:
    """Reduce numbers to their norm and eight random projections, on which rounding leaves no trace; text to a hash."""
    if isinstance(thing, Mapping):
        thing = [thing[key] for key in sorted(thing)]
    if isinstance(thing, tuple | list):
        inner = [sketch(x) for x in thing]
        numbers = [x for x in inner if isinstance(x, list)]
        return [value for x in numbers for value in x] if len(numbers) == len(inner) else _hash(inner)
    if not isinstance(thing, Tensor | int | float) and not hasattr(thing, "__array__"):
        return _hash(thing)
    flat = torch.as_tensor(np.asarray(thing)).float().flatten()
    norm = float(flat.norm())
    return [round(x, 4) for x in (norm, *(_projections(flat.numel()) @ flat / max(norm, 1e-12)).tolist())]


@functools.lru_cache(maxsize=4)
def _projections(size: int) -> Tensor:
    random = torch.Generator().manual_seed(size)
    return torch.randint(2, (8, size), generator=random).mul_(2).sub_(1).float()


def _same(name: str, stored: Any, now: Any) -> bool:
    if name not in ("samples", "targets"):
        return bool(stored == now)
    return stored.keys() == now.keys() and all(_close(stored[key], value) for key, value in now.items())


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, str) or isinstance(other, str) or one is None:
        return bool(one == other)
    return len(one) == len(other) and np.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE)


def _networks(source: Any) -> list[nn.Module]:
    if isinstance(source, nn.Module):
        return [source]
    if isinstance(source, list | tuple):
        return [network for part in source for network in _networks(part)]
    return _networks([x for _, x in sorted(vars(source).items())]) if isinstance(source, TeacherSource) else []


def _hash(thing: object) -> str:
    return hashlib.blake2b(repr(thing).encode(), digest_size=8).hexdigest()


def _map(item: Any, function: Any) -> Any:
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(_map(x, function) for x in item))
    if isinstance(item, tuple | list):
        return type(item)(_map(x, function) for x in item)
    if isinstance(item, Mapping):
        return {key: _map(x, function) for key, x in item.items()}
    return function(item)


def _short(value: object, most: int = 120) -> str:
    text = str(value)
    return text if len(text) <= most else text[:most] + "…"
