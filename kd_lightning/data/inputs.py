"""What a training reads, split by split, with what tells one set of samples from another."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from kd_lightning.data.contract import Data


def inputs_of(data: Data, config: Any) -> list[dict[str, Any]]:
    """Describe the data of a training, in JSON values.

    Args:
        data: Of the training.
        config: Its configuration. It stands for the samples of a module that has no ``digests``, beside what that gives
            as its ``fingerprint`` and the number of samples.

    Returns:
        For each split ``name``, ``digest``, ``context``, ``rows`` (None where the length is not known), ``made_by`` and
        ``folder``, as :func:`kd_lightning.tracking.datasets.dataset` takes them.
    """
    data.setup("fit")
    data.setup("test")
    kind = type(data.module)
    known: dict[str, tuple[str, int | None]] = {**(data.digests() or {})}
    if not known:
        basis = data.fingerprint() or config
        loaders = (data.train_dataloader, data.val_dataloader, data.test_dataloader)
        for context, loader in zip(("training", "validation", "test"), loaders, strict=True):
            rows = _length(getattr(loader(), "dataset", None))
            content = json.dumps([basis, context, rows], sort_keys=True, default=str)
            known[context] = (hashlib.sha256(content.encode()).hexdigest(), rows)
    folder = config.get("folder") if isinstance(config, Mapping) else None
    shared = {
        "name": kind.__name__,
        "made_by": f"{kind.__module__}.{kind.__qualname__}",
        "folder": folder if isinstance(folder, str) else None,
    }
    return [{**shared, "context": context, "digest": digest, "rows": rows} for context, (digest, rows) in known.items()]


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None
