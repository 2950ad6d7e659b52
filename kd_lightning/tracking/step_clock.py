"""How fast a training goes, and how much of that the teacher takes."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch


class StepClock:
    """Counts samples and time from one logged step to the next; between them it takes a microsecond a step.

    On a CUDA device the teacher's time is that of its kernels, by events; elsewhere that of the call.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was counted, as after a validation, whose time is not the training's."""
        self._begun: float | None = None
        self._samples, self._seconds = 0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def teaching(self, device: torch.device) -> Iterator[None]:
        """Count the time of a call of the teacher."""
        if device.type == "cuda":
            event = partial(torch.cuda.Event, enable_timing=True)
            events = event(), event()
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
        else:
            begun = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begun

    def step(self, samples: int, device: torch.device, logged: bool) -> dict[str, float]:
        """Count a step; return what is known of the steps since the last that was logged, where this one is.

        Args:
            samples: Of the batch.
            device: That it is on.
            logged: Whether to return something, and begin anew.

        Returns:
            ``train/samples_per_s`` (of this process), ``train/teacher_share`` (of the time, in [0, 1]) and
            ``train/peak_memory_mb`` (10^6 bytes; of the device, or of the process on a CPU).
        """
        if self._begun is None:
            self.restart()
            self._begun = time.perf_counter()  # the first step is not counted: its beginning is not known
            return {}
        self._samples += samples
        if not logged:
            return {}
        seconds = self._seconds
        if self._events:
            torch.cuda.synchronize(device)
            seconds += sum(begun.elapsed_time(ended) for begun, ended in self._events) / 1000
        elapsed = time.perf_counter() - self._begun
        found = {
            "train/samples_per_s": self._samples / elapsed,
            "train/teacher_share": min(seconds / elapsed, 1.0),
        }
        memory = _peak_memory(device)
        if memory is not None:
            found["train/peak_memory_mb"] = memory / 1e6
        self.restart()
        self._begun = time.perf_counter()
        return found


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
