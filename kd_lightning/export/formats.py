"""What can be written, and what that needs."""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

_ONNX = ("onnx", "onnxscript", "onnxruntime")


class Format(NamedTuple):
    """One kind of file.

    Attributes:
        suffix: Of the path.
        precisions: That it can have.
        packages: That write it and read it back.
        extra: Of this package, that brings these.
    """

    suffix: str
    precisions: tuple[str, ...]
    packages: tuple[str, ...] = ()
    extra: str = ""


FORMATS = {
    "onnx": Format(".onnx", ("float32", "float16", "int8", "int8_dynamic", "int4"), _ONNX, "onnx"),
    "openvino": Format(".xml", ("float32", "float16", "int8", "int4"), (*_ONNX, "openvino"), "openvino"),
    "torch_export": Format(".pt2", ("float32", "float16")),
    "state_dict": Format(".safetensors", ("float32", "float16"), ("safetensors",), "safetensors"),
}


def check_format(format: str, precision: str, path: Path) -> None:
    """Raise ValueError for what cannot be written, ImportError where packages are missing."""
    if format not in FORMATS:
        raise ValueError(f"expected format to be one of {', '.join(FORMATS)}, got {format!r}")
    known = FORMATS[format]
    if precision not in known.precisions:
        raise ValueError(
            f"expected precision to be one of {', '.join(known.precisions)} in {format}, got {precision!r}"
        )
    if path.suffix != known.suffix:
        raise ValueError(
            f"expected a path that ends in {known.suffix} for format={format!r}, got {path.name!r}: rename it, or "
            f"pass the format of this file"
        )
    require(f"format={format!r}", known.packages, known.extra)


def require(what: str, packages: tuple[str, ...], extra: str) -> None:
    """Raise ImportError where a package is missing, with the extra that brings it."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{what} expects the packages {', '.join(packages)}, got none of the name {', '.join(missing)}: "
            f"pip install 'kd-lightning[{extra}]'"
        )
