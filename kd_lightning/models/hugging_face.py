"""Models of Hugging Face's ``transformers``, by name or from a folder."""

import difflib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from kd_lightning.models.lora import add_lora

Kind = Literal["causal", "masked", "sequence_classification", "token_classification"]
_HEADS = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
}


def hugging_face(
    name: str,
    kind: Kind = "causal",
    revision: str | None = None,
    pretrained: bool = True,
    dtype: str = "float32",
    attention: str | None = None,
    config: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Return a language model from the hub, or from a folder that ``save_pretrained`` has written.

    Its first argument is the tokens (B, S), so that it takes batches (tokens, target) as well as mappings by the names
    of its ``forward``. It keeps no keys and values of a text that goes on, which training has no use for.

    Args:
        name: On the hub, such as ``Qwen/Qwen2.5-0.5B``, or the folder.
        kind: ``causal`` (the next token), ``masked`` (the tokens that were taken out), ``sequence_classification`` or
            ``token_classification``.
        revision: Commit, tag or branch on the hub.
        pretrained: Whether its weights are loaded; else they are random, and its configuration alone is.
        dtype: Of the weights: ``float32``, or ``bfloat16`` for a teacher that is not to take twice the memory.
        attention: How attention is computed, such as ``sdpa``, ``eager`` or ``flash_attention_2``; its own default
            unless given.
        config: What to change in its configuration, such as ``{num_labels: 3}``.
        lora: Train an adapter alone; see :func:`~kd_lightning.models.lora.add_lora`.
        trust_remote_code: See :func:`load`.

    Raises:
        ImportError: Without transformers, or without peft for ``lora``.
        ValueError: For another kind or dtype, an adapter on random weights, and as :func:`load`.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"expected kind to be one of {', '.join(get_args(Kind))}, got {kind!r}")
    number = getattr(torch, dtype, None)
    if not isinstance(number, torch.dtype) or not number.is_floating_point:
        raise ValueError(f"expected dtype to be float32, bfloat16 or float16, got {dtype!r}")
    if lora is not None and not pretrained:
        raise ValueError(
            "lora= trains an adapter of weights that stay, and the checkpoint holds the adapter alone, expected "
            "pretrained=true: random weights would be others next time"
        )
    options = {**(config or {}), "dtype": number}
    if attention is not None:
        options["attn_implementation"] = attention
    if revision is not None:
        options["revision"] = revision
    network = load(name, _HEADS[kind], pretrained, trust_remote_code, **options)
    network.train()  # transformers gives models in eval mode
    return network if lora is None else add_lora(network, **lora)


def load(name: str, head: str, pretrained: bool = True, trust_remote_code: bool = False, **options: Any) -> Any:
    """Return a model of ``transformers``.

    Args:
        name: On the hub, or a folder.
        head: Name of the class with the logits that are wanted, such as ``AutoModelForCausalLM``.
        pretrained: Whether its weights are loaded; else only its configuration.
        trust_remote_code: Runs the Python files that come with the model, with all that you may do on this machine.
            Read them first, and name the version that you have read: ``revision="<commit>"``.
        options: Of ``from_pretrained``, and of the configuration.

    Raises:
        ImportError: Without transformers.
        ValueError: For a head that it does not have; for a name that is neither a folder nor on the hub, nor in the
            cache where the hub cannot be reached; for a model that is made by code of its own, unless that is trusted,
            with the version that is.
    """
    if trust_remote_code and not Path(name).is_dir() and not options.get("revision"):
        raise ValueError(
            f"trust_remote_code=True runs whatever code {name} has today, expected the version that was read: pass "
            "revision=<its commit>, too"
        )
    transformers = import_extra("transformers", "transformers")
    kind = getattr(transformers, head, None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        heads = [name for name in dir(transformers) if name.startswith("AutoModel")]
        raise unknown("transformers", head, heads, "head")
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        raise ValueError(_not_there(name, "no config.json"))
    try:
        with _quiet(transformers, name):
            network = _made(transformers, kind, name, pretrained, trust_remote_code, options)
    except OSError as error:
        raise ValueError(_not_there(name, _first_line(error))) from error
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name} is made by Python files that come with it, expected a model that transformers itself has: choose "
            "another one; or read these files, and pass trust_remote_code=True and revision=<the commit that you read>"
        ) from error
    if getattr(network.config, "use_cache", False):
        network.config.use_cache = False
    return network


def _made(package: Any, kind: Any, name: str, pretrained: bool, trust: bool, options: dict[str, Any]) -> Any:
    if pretrained:
        return kind.from_pretrained(name, trust_remote_code=trust, **options)
    of_model = {key: options.pop(key) for key in ("dtype", "attn_implementation") if key in options}
    config = package.AutoConfig.from_pretrained(name, trust_remote_code=trust, **options)
    return kind.from_config(config, trust_remote_code=trust, **of_model)


@contextmanager
def _quiet(package: Any, name: str) -> Iterator[None]:
    """Show no progress bar for weights that lie on this disk: a pipeline reads them once a stage."""
    logging = package.utils.logging
    shown = logging.is_progress_bar_enabled() and Path(name).is_dir()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def import_extra(module: str, extra: str) -> Any:
    """Import a package that an extra of this one brings.

    Raises:
        ImportError: When it is not there, or not for this torch.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # a torchvision that was built for another torch raises the latter
        package = module.partition(".")[0]
        raise ImportError(
            f"{package} cannot be imported ({str(error).splitlines()[0]}), expected it for a model by name: pip "
            f"install 'kd-lightning[{extra}]', in versions that belong to the torch that is there"
        ) from error


def unknown(where: str, name: str, names: Iterable[str], what: str = "model") -> ValueError:
    """Return the error for a name that is not there, with the nearest that are."""
    nearest = ", ".join(difflib.get_close_matches(name, list(names), n=6, cutoff=0.0))
    return ValueError(f"{where} has no {what} {name!r}, expected one of its names; nearest: {nearest}")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _not_there(name: str, reason: str) -> str:
    if Path(name).is_dir():
        return (
            f"the folder {name} holds no such model ({reason}): expected config.json and the weights that "
            "save_pretrained(folder) writes"
        )
    return (
        f"{name} is no folder, and was found neither on Hugging Face's hub nor in the cache of earlier downloads "
        f"({reason}): expected a name of the hub or a folder; where there is no network, run `hf download {name}` on a "
        "machine that has one, and pass the folder that it prints"
    )
