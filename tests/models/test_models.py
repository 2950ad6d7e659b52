from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

import kd_lightning.models
from kd_lightning.models import CNN8, CNN64, MLP32, CIFARResNet, TabularMLP, UNet, resnet8x4, resnet32x4
from kd_lightning.outputs import run

CONF = Path(__file__).parents[2] / "conf" / "models"
CONFIGS = sorted(file.stem for file in CONF.glob("*.yaml"))
NETWORKS = {
    "cnn8": (CNN8, (1, 28, 28)),
    "mlp32": (MLP32, (1, 28, 28)),
    "cnn64": (CNN64, (1, 28, 28)),
    "resnet8x4": (resnet8x4, (3, 32, 32)),
    "tabular": (lambda num_classes: TabularMLP(num_classes, widths=[8, 4]), (10,)),
    "resnet20": (lambda num_classes: CIFARResNet(20, (16, 16, 32, 64), num_classes), (3, 32, 32)),
}


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_published_pair_has_the_published_numbers_of_parameters():
    assert parameters(resnet32x4(100)) == 7_433_860
    assert parameters(resnet8x4(100)) == 1_233_540


@pytest.mark.parametrize(("depth", "count"), [(20, 278_324), (56, 861_620), (110, 1_736_564)])
def test_narrow_networks_have_the_published_numbers_of_parameters(depth: int, count: int):
    assert parameters(CIFARResNet(depth, (16, 16, 32, 64), 100)) == count


def test_the_small_networks_are_as_small_as_they_say():
    assert parameters(CNN8()) == 6_218
    assert parameters(MLP32()) == 25_450
    assert parameters(CNN64()) == 107_978
    assert parameters(UNet(width=12)) == 136_781
    assert parameters(UNet(width=8, depth=2)) == 14_677


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("num_classes", [2, 10])
def test_a_batch_of_any_size_becomes_logits(name: str, num_classes: int):
    make, shape = NETWORKS[name]
    network = make(num_classes=num_classes).eval()
    batch = torch.randn(3, *shape)
    logits = network(batch)
    assert logits.shape == (3, num_classes)
    torch.testing.assert_close(network(batch[:1]), logits[:1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("cnn8", {"block1": (8, 14, 14), "block2": (16, 7, 7), "block3": (16, 4, 4)}),
        ("mlp32", {"hidden": (32,)}),
        (
            "cnn64",
            {
                "block1": (16, 28, 28),
                "block2": (32, 14, 14),
                "block3": (32, 14, 14),
                "block4": (64, 7, 7),
                "hidden": (128,),
            },
        ),
        (
            "resnet8x4",
            {"layer1": (64, 32, 32), "layer2": (128, 16, 16), "layer3": (256, 8, 8), "avgpool": (256, 1, 1)},
        ),
    ],
)
def test_the_layers_that_the_docstrings_name_can_be_tapped(name: str, shapes: dict[str, tuple[int, ...]]):
    make, shape = NETWORKS[name]
    features = run(make(num_classes=10), (torch.randn(2, *shape),), {}, layers=tuple(shapes)).features
    assert {layer: tuple(feature.shape[1:]) for layer, feature in features.items()} == shapes


@pytest.mark.parametrize("name", NETWORKS)
def test_no_layer_overwrites_what_was_tapped_before_it(name: str):
    make, shape = NETWORKS[name]
    network = make(num_classes=10)
    captured: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    for layer, module in network.named_modules():
        module.register_forward_hook(lambda _, __, out, layer=layer: captured.append((layer, out, out.clone())))
    network(torch.randn(2, *shape))
    assert [layer for layer, out, before in captured if not torch.equal(out, before)] == []


def test_layers_and_weights_are_named_as_in_the_published_code():
    network = resnet32x4(100)
    assert [name for name, _ in network.named_children()] == [
        "conv1", "bn1", "relu", "layer1", "layer2", "layer3", "avgpool", "fc",
    ]  # fmt: skip
    names = set(network.state_dict())
    assert {"layer1.0.conv1.weight", "layer1.4.bn2.running_var", "layer3.0.downsample.1.weight", "fc.bias"} <= names
    assert not any("downsample" in name for name in names if ".0." not in name[:9])


@pytest.mark.parametrize("depth", [2, 9, 21])
def test_a_depth_that_no_such_network_has_is_refused(depth: int):
    with pytest.raises(ValueError, match=rf"expected a depth of 6n \+ 2 .*, got {depth}"):
        CIFARResNet(depth, (16, 16, 32, 64))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("hugging_face", "minilm")])
def test_each_config_makes_a_network_with_its_number_of_classes(name: str):
    config: Any = OmegaConf.load(CONF / f"{name}.yaml")
    numbers = {"tabular": "outputs", "gpt": "vocabulary", "token": "dimensions"}
    number = next((numbers[kind] for kind in numbers if name.startswith(kind)), "num_classes")
    if name == "token_encoder":
        config.tokens_of = None  # a package
    for classes in (config[number], 7):
        network = instantiate(config, **{number: classes}, _convert_="all").eval()
        if name.startswith("tagger"):
            assert network(torch.zeros(1, 20, 12).long()).shape == (1, 20, classes)
        elif name.startswith("gpt"):
            assert network(torch.zeros(1, 20).long()).shape == (1, 20, classes)
        elif name == "token_encoder":
            assert network(torch.zeros(1, 20).long()).shape == (1, classes)
        elif name.startswith("unet"):
            assert network(torch.zeros(1, 1, 32, 32)).shape == (1, classes, 32, 32)
        elif name.startswith("tabular"):
            assert network(torch.zeros(1, 10)).shape == (1, classes)
        else:
            size = (3, 32, 32) if "resnet" in name else (1, 28, 28)
            assert network(torch.zeros(1, *size)).shape == (1, classes)


def test_each_network_has_a_config():
    targets = {OmegaConf.load(CONF / f"{name}.yaml")._target_ for name in CONFIGS}
    named = set(kd_lightning.models.__all__) - {"CIFARResNet"}  # which the two resnets are
    assert targets == {f"kd_lightning.models.{name}" for name in named}


def test_a_unet_gives_a_class_at_each_pixel_of_images_of_any_size_that_it_can_halve():
    network = UNet(num_classes=3, in_channels=2, width=4, depth=2).eval()
    layers = ("down.0", "down.1", "down.2", "up.0", "up.1")
    features = run(network, (torch.randn(2, 2, 16, 24),), {}, layers=layers).features
    assert {name: tuple(x.shape[1:]) for name, x in features.items()} == {
        "down.0": (4, 16, 24),
        "down.1": (8, 8, 12),
        "down.2": (16, 4, 6),
        "up.0": (8, 8, 12),
        "up.1": (4, 16, 24),
    }
    assert network(torch.zeros(1, 2, 8, 8)).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="expected width and depth of 1 or more, got 4 and 0"):
        UNet(width=4, depth=0)


def test_a_unets_first_layer_reaches_its_output_without_the_way_down():
    network = UNet(width=4, depth=2).eval()
    images = torch.randn(1, 1, 16, 16)
    before = network(images)
    with torch.no_grad():
        for block in network.down[1:]:
            block[0].weight.zero_()
    assert not torch.allclose(network(images), network(torch.zeros_like(images)))
    assert not torch.allclose(network(images), before)


def test_a_tabular_mlps_layers_are_as_wide_as_asked_for():
    features = run(TabularMLP(2, 10, [8, 3]), (torch.randn(5, 10),), {}, layers=("hidden.0", "hidden.1")).features
    assert {name: tuple(x.shape) for name, x in features.items()} == {"hidden.0": (5, 8), "hidden.1": (5, 3)}
    for widths in ([], [4, 0]):
        with pytest.raises(ValueError, match="expected widths of one or more hidden layers, 1 or more each, got"):
            TabularMLP(widths=widths)
