"""What the machine does is measured by itself, and logged under MLflow's names."""

import threading

from kd_lightning.tracking.system import SystemMetrics


def test_values_come_until_it_is_stopped() -> None:
    logged: list[tuple[dict[str, float], int]] = []
    enough = threading.Event()

    def log(values, step) -> None:
        logged.append((dict(values), step))
        if step == 1:
            enough.set()

    measuring = SystemMetrics(log, seconds=0.01)
    assert enough.wait(60)
    measuring.stop()
    measuring._thread.join(60)
    assert not measuring._thread.is_alive()
    assert [step for _, step in logged] == list(range(len(logged)))
    for values, _ in logged:
        assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(values)
        assert values["system/system_memory_usage_megabytes"] > 0
