"""A student as a file that serves without this package."""

import os
import sys

from kd_lightning.export.integer_operators import IntegerOperators, integer_operators
from kd_lightning.export.to_file import LEAST_AGREEMENT, ExportReport, export

__all__ = ["LEAST_AGREEMENT", "ExportReport", "IntegerOperators", "export", "integer_operators"]

# Before they are imported: ONNX Runtime, OpenVINO and nncf would report their use over the network, the first with the
# file's name and the hash of its weights, the others from threads that fork this process while it computes. A fork ends
# OpenBLAS's threads, and a matrix product of NumPy that is under way then never returns.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as if it were not installed
