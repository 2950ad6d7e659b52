"""What a resumed training needs beyond Lightning's checkpoint to be the uninterrupted one, bit by bit."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer


def rng_states() -> dict[str, Any]:
    """Return the states of all random number generators, as plain values that ``weights_only`` loading accepts."""
    algorithm, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "python": random.getstate(),
        "numpy": (algorithm, np.asarray(keys).tolist(), *rest),
    }


class Resumption:
    """Puts the generators of a checkpoint back when the training that it belongs to goes on.

    With several processes it does not: one state was saved, and they should not all draw the same numbers.

    Attributes:
        states: As :func:`rng_states` returned them; None where there is nothing to put back.
    """

    def __init__(self) -> None:
        self.states: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Trainer) -> None:
        if trainer.world_size > 1:
            self.states = None
        if self.states is not None:
            _set_rng_states(self.states)
            if not _starts_with_an_epoch(trainer):
                self.on_train_epoch_start(trainer)

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        if self.states is not None:
            _renew_iterator(trainer)
            self.states = None


def begin_with_next_epoch(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Make a checkpoint that was written when an epoch had ended one of the next epoch's beginning.

    Where ``max_steps`` is given, Lightning (2.6) takes such an epoch for one that goes on: it gives a single batch of
    the next two epochs, and leaves out the rest. With ``max_epochs`` alone it does not, and nothing is done.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if trainer.max_steps == -1 or loops is None:
        return
    epochs = loops["epoch_progress"]
    if epochs["current"]["started"] != epochs["current"]["processed"]:
        return  # within an epoch
    for count in (epochs["total"], epochs["current"]):
        count["ready"], count["completed"] = count["processed"] + 1, count["processed"]
    batches = loops["epoch_loop.batch_progress"]
    batches["is_last_batch"] = False
    optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    of_this_epoch = [
        batches["current"],
        loops["epoch_loop.scheduler_progress"]["current"],
        optimizer["step"]["current"],
        optimizer["zero_grad"]["current"],
        loops["epoch_loop.val_loop.batch_progress"]["total"],
    ]
    for count in of_this_epoch:
        count.update(dict.fromkeys(count, 0))


def _set_rng_states(states: Mapping[str, Any]) -> None:
    """Put the generators where :func:`rng_states` found them."""
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])


def _renew_iterator(trainer: Trainer) -> None:
    """Start the training loader's iterator anew, where Lightning goes on with one from before the resume.

    Lightning starts an iterator at each epoch, but for the first epoch of a resumed training while it is set up: when
    the generators have not been restored, from which the iterator draws the seeds of its workers and of a shuffle.
    """
    loop = trainer.fit_loop
    goes_on = loop.epoch_loop.restarting or getattr(loop, "is_resuming", False)  # is_resuming: since lightning 2.6
    loaders = loop._combined_loader.flattened if loop._combined_loader is not None else []
    has_its_own_state = any(hasattr(loader, "load_state_dict") for loader in loaders)
    if goes_on and trainer.current_epoch > 0 and not has_its_own_state and loop._data_fetcher is not None:
        iter(loop._data_fetcher)


def _starts_with_an_epoch(trainer: Trainer) -> bool:
    """Tell whether ``on_train_epoch_start`` comes before the first batch of a resumed training.

    Lightning leaves it out after a checkpoint that was written when an epoch's last batch ended.
    """
    loop = trainer.fit_loop
    if not getattr(loop.epoch_loop, "restarted_on_train_batch_end", False):  # since lightning 2.5.1
        return True
    left_out = loop.restarted_mid_epoch or loop.restarted_on_epoch_end
    return not (left_out and loop.epoch_loop.batch_progress.is_last_batch)
