"""What the machine does while a run trains, under the names that MLflow has for it."""

import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

_SECONDS = 10.0
_log = logging.getLogger(__name__)


class SystemMetrics:
    """Measures with MLflow's own monitors: processors, memory, disk, network, GPUs; hands on what it has measured.

    MLflow's ``SystemMetricsMonitor`` asks the store itself each time, and stops for good when that does not answer.

    Args:
        log: Given values by name, such as ``system/cpu_utilization_percentage``, and their step.
        seconds: Between two measurements.
    """

    def __init__(self, log: Callable[[Mapping[str, float], int], None], seconds: float | None = None) -> None:
        self._log = log
        self._seconds = seconds or float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or _SECONDS)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._measure, name="kd-lightning system metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it; what is measured at the moment is left out."""
        self._over.set()

    def _measure(self) -> None:
        step, monitors = 0, _monitors()
        for monitor in monitors:  # the load of processors is that since the last measurement
            monitor.collect_metrics()
            monitor.clear_metrics()
        while monitors and not self._over.wait(self._seconds):
            values: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                values |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            if not self._over.is_set():
                self._log({f"system/{name}": value for name, value in values.items()}, step)
            step += 1


def _monitors() -> list[Any]:
    try:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    except ImportError as error:
        _log.warning("system metrics are not measured (%s): pip install psutil", error)
        return []
    kinds: list[Any] = [CPUMonitor, DiskMonitor, NetworkMonitor]
    found, gpu = [kind() for kind in kinds], cast("Any", GPUMonitor)
    try:
        found.append(gpu())
    except Exception:  # neither nvidia-ml-py nor a GPU need be there
        _log.debug("no GPU is measured", exc_info=True)
    return found
