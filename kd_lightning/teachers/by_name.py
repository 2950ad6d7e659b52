"""Teachers that others have trained, by the name under which they publish them.

The teacher gets the very tensors that the student gets, so the data have to be as *it* was trained on them: its image
size (or one that it takes, too), its normalisation, its tokenizer, and its classes in its order. Each function says in
the log what the weights expect, as far as they tell; a teacher at chance on the training data is refused before
training.
"""

from collections.abc import Iterable
from os import PathLike
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from kd_lightning.models.hugging_face import import_extra, load, unknown
from kd_lightning.teachers.live import Teacher


def from_timm(
    name: str,
    pretrained: bool = True,
    checkpoint: str | PathLike[str] | None = None,
    accelerate: str | Iterable[str] = (),
    **options: Any,
) -> Teacher:
    """Return a teacher among timm's models, such as ``resnet50.a1_in1k``.

    Args:
        name: See ``timm.list_models(pretrained=True)``; ``hf-hub:...`` and ``local-dir:...`` work, too.
        pretrained: Whether its published weights are fetched.
        checkpoint: Weights of your own; see :class:`Teacher`.
        accelerate: See :class:`Teacher`.
        options: Of ``timm.create_model``, such as ``num_classes``.

    Raises:
        ImportError: Without timm.
        ValueError: For a name that it does not have.
    """
    if "trust_remote_code" in options:
        raise ValueError("timm runs no code that comes with a model, expected no trust_remote_code: leave it out")
    timm = import_extra("timm", "timm")
    if ":" not in name and not timm.is_model(name):
        raise unknown("timm", name, timm.list_models())
    network = timm.create_model(name, pretrained=pretrained, **options)
    expected = getattr(network, "pretrained_cfg", None) or {}
    _say(name, expected.get("input_size"), expected.get("mean"), expected.get("std"))
    return Teacher(network, checkpoint, accelerate)


def from_torchvision(
    name: str,
    weights: str | None = "DEFAULT",
    checkpoint: str | PathLike[str] | None = None,
    accelerate: str | Iterable[str] = (),
    **options: Any,
) -> Teacher:
    """Return a teacher among torchvision's classification models, such as ``resnet50``.

    Args:
        name: See ``torchvision.models.list_models(torchvision.models)``.
        weights: Which of its published weights are fetched, such as ``IMAGENET1K_V2``; None for none.
        checkpoint: Weights of your own; see :class:`Teacher`.
        accelerate: See :class:`Teacher`.
        options: Of the model, such as ``num_classes``.

    Raises:
        ImportError: Without torchvision, and for one that was built for another torch.
        ValueError: For a name that it does not have.
    """
    models = import_extra("torchvision.models", "vision")
    names = models.list_models(models)
    if name.lower() not in names:
        raise unknown("torchvision", name, names)
    found = None
    if weights is not None:
        published = models.get_model_weights(name)
        if weights not in published.__members__:
            raise unknown(f"torchvision's {name}", weights, list(published.__members__), "weights")
        found = published[weights]
    network = models.get_model(name, weights=found, **options)
    if found is not None:
        preset = found.transforms()
        size = getattr(preset, "crop_size", None)
        _say(name, size and (3, *size * (2 // len(size))), getattr(preset, "mean", None), getattr(preset, "std", None))
    return Teacher(network, checkpoint, accelerate)


def from_transformers(
    name: str,
    head: str = "AutoModelForImageClassification",
    pretrained: bool = True,
    checkpoint: str | PathLike[str] | None = None,
    accelerate: str | Iterable[str] = (),
    trust_remote_code: bool = False,
    **options: Any,
) -> Teacher:
    """Return a teacher from the Hugging Face hub, or from a folder that ``save_pretrained`` has written.

    Batches are mappings by the names of its ``forward`` (``pixel_values``; ``input_ids``, ``attention_mask``), as its
    image processor or tokenizer makes them, with ``labels``; an image model also takes (image, label).

    Args:
        name: On the hub, such as ``microsoft/resnet-50``, or the folder.
        head: Name of the class with the logits that are wanted: ``AutoModelForImageClassification``,
            ``AutoModelForSequenceClassification``, ``AutoModelForCausalLM`` ...
        pretrained: Whether its weights are loaded; else only its configuration.
        checkpoint: Weights of your own; see :class:`Teacher`.
        accelerate: See :class:`Teacher`.
        trust_remote_code: Runs the Python files that come with the model; see
            :func:`~kd_lightning.models.hugging_face.load`.
        options: Of ``from_pretrained``, or of the configuration where not ``pretrained``, such as ``num_labels``.

    Raises:
        ImportError: Without transformers.
        ValueError: As :func:`~kd_lightning.models.hugging_face.load`.
    """
    network = load(name, head, pretrained, trust_remote_code, **options)
    return Teacher(network, checkpoint, accelerate)


def _say(name: str, size: Any, mean: Any, std: Any) -> None:
    if mean is not None:
        shape = "×".join(map(str, size)) if size else "its"
        rank_zero_info(
            f"teacher {name}: trained on {shape} inputs, normalised with mean {list(mean)} and std {list(std)}: the "
            "data have to be normalised so, too"
        )
