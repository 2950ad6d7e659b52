"""``lightning.pytorch`` and ``pytorch_lightning``: one code under two names, whose classes are not each other's.

A project imports one of them, and its Trainer and LightningModule say which. What is here works with both: it asks
neither for its classes where calling a method does, and for both where a class has to be told. ``pytorch_lightning`` is
never imported for that, since that takes time and changes where Lightning's messages go: who has a Trainer of it has
imported it.
"""

import sys

from lightning import pytorch


def of_both(kind: type) -> tuple[type, ...]:
    """Return a class of ``lightning.pytorch``, and the same of ``pytorch_lightning`` where that is imported.

    Example:
        >>> of_both(pytorch.Trainer)[0]
        <class 'lightning.pytorch.trainer.trainer.Trainer'>
    """
    module = sys.modules.get(kind.__module__.replace("lightning.pytorch", "pytorch_lightning", 1))
    other = getattr(module, kind.__name__, None)
    return (kind,) if other is None else (kind, other)


class Callback(pytorch.Callback):
    """A callback of ``lightning.pytorch``, and of ``pytorch_lightning`` as well once that is imported.

    A Trainer calls whatever has the hooks. But ``Trainer(callbacks=one)``, without a list, and ``LightningCLI`` look at
    the class.
    """

    def __init__(self) -> None:
        _extend_bases()


def _extend_bases() -> None:
    missing = tuple(kind for kind in of_both(pytorch.Callback) if kind not in Callback.__bases__)
    if missing:
        Callback.__bases__ = (*Callback.__bases__, *missing)


_extend_bases()  # LightningCLI looks at the class, ahead of any instance
