import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning.models import CNN8, resnet8x4
from kd_lightning.quantization import (
    QuantizationSpec,
    calibrate,
    is_prepared,
    prepare,
    quantized_layers,
    set_fake_quantization,
    set_observers,
    spec_of,
)
from tests.quantization.networks import FunctionalResidual, PreActivation, Transformer, Untraceable, settled


def images(*shape, count=32, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def batches(x):
    return DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.long)), batch_size=16)


def notes(network):
    return {layer.name: layer.note for layer in quantized_layers(network) if layer.note}


def test_names_parameters_and_hooks_stay_and_nothing_changes_until_it_is_switched_on():
    network = settled(CNN8())
    x = images(1, 28, 28)
    before, names = network(x), [name for name, _ in network.named_parameters()]
    parameters, seen = list(network.parameters()), []
    network.block2.register_forward_hook(lambda module, args, output: seen.append(output))
    assert prepare(network) is network
    assert is_prepared(network)
    assert [name for name, _ in network.named_parameters()] == names
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    assert torch.equal(network(x), before)
    assert seen[0].shape == (32, 16, 7, 7)
    float_keys = set(CNN8().state_dict())
    assert float_keys <= set(network.state_dict())
    assert isinstance(network.block1[0], nn.Conv2d)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_copies_and_pickles_quantise_alike(copied):
    network, x = prepare(settled(CNN8())), images(1, 28, 28)
    calibrate(network, batches(x))
    other = copied(network)
    assert torch.equal(other(x), network(x))
    set_fake_quantization(other, False)
    assert not torch.equal(other(x), network(x))  # they share nothing


def test_compiled_it_gives_the_same():
    network, x = prepare(settled(CNN8())), images(1, 28, 28)
    calibrate(network, batches(x))
    expected = network(x)
    network.compile(backend="aot_eager")
    torch.testing.assert_close(network(x), expected)


def test_eight_bits_stay_close_and_two_do_not():
    x, errors = images(1, 28, 28), {}
    for bits in (8, 2):
        network = settled(CNN8())
        torch.manual_seed(0)
        for parameter in network.parameters():
            nn.init.normal_(parameter, 0.1, 0.3)
        expected = network(x)
        calibrate(prepare(network, QuantizationSpec(weight_bits=bits)), batches(x))
        errors[bits] = float(((network(x) - expected).norm() / expected.norm()).detach())
    assert errors[8] < 0.02 < 0.1 < errors[2]


def test_every_layer_is_quantised_and_each_value_once():
    network = prepare(resnet8x4())
    assert [layer[1:] for layer in quantized_layers(network)] == [("Conv2d", 8, 8, "")] * 9 + [("Conv2d", 8, 8, "")] * (
        len(quantized_layers(network)) - 10
    ) + [("Linear", 8, 8, "")]
    inputs = [name for name, m in network.named_modules() if getattr(m, "input_quantizer", None) is not None]
    # All others read what a block's end has put on a grid; the pooled mean lies between its levels.
    assert inputs == ["conv1", "fc"]


def test_layers_that_are_left_out_stay_in_float_with_what_they_read():
    network = prepare(CNN8(), QuantizationSpec(skip=("first", "block2", "last")))
    assert [(layer.name, layer.weight_bits) for layer in quantized_layers(network)] == [
        ("block1.0", 32),
        ("block2.0", 32),
        ("block3.0", 8),
        ("head", 32),
    ]
    assert notes(network)["head"] == "stays in float: left out"
    assert type(network.block1[0]) is nn.Conv2d
    outputs = [name for name, m in network.named_modules() if hasattr(m, "output_quantizer")]
    # block1's is read by a layer in float alone; block3's is cut off by the one after its batch norm.
    assert outputs == ["block2.2", "block3.1"]


def test_a_name_that_is_no_layer_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"skip names 'haed', which is no module .* 'block3.0', 'head'"):
        prepare(CNN8(), QuantizationSpec(skip=("haed",)))


def test_nothing_to_quantise_is_an_error():
    with pytest.raises(ValueError, match="expected a convolution or linear layer to quantise, got none of 0 in ReLU"):
        prepare(nn.ReLU())
    with pytest.raises(ValueError, match=r"got none of 1 in Linear with skip=\('first',\)"):
        prepare(nn.Linear(2, 2), QuantizationSpec(skip=("first",)))


def test_preparing_twice_is_an_error():
    with pytest.raises(ValueError, match="got one that is prepared already"):
        prepare(prepare(CNN8()))
    with pytest.raises(ValueError, match="expected a prepared network, got one in float: call prepare"):
        set_observers(CNN8(), False)


def test_a_layer_with_a_forward_of_its_own_is_reported():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    network = prepare(nn.Sequential(nn.Linear(4, 4), Scaled(4, 4)))
    assert notes(network) == {"1": "stays in float: Scaled has a forward of its own"}


def test_a_network_that_cannot_be_traced_is_quantised_at_its_layers():
    network, x = Untraceable(), images(12)
    expected = network(x)
    calibrate(prepare(network), batches(x))
    assert network.body.input_quantizer is not None
    assert network.head.input_quantizer is not None
    assert 0 < (network(x) - expected).norm() / expected.norm() < 0.05

    class Convolution(Untraceable):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 1)

    assert (
        "the network cannot be traced (TraceError: symbolically traced variables cannot be used as inputs to control"
        in notes(prepare(Convolution()))["conv"]
    )


def test_torchs_own_blocks_are_looked_into_and_do_not_go_around_their_layers():
    network, x = Transformer().eval(), images(5, 8)
    calibrate(prepare(network), batches(x))
    assert network.block.linear1.input_quantizer.observed
    with torch.no_grad():
        rounded = network(x)
        torch.testing.assert_close(rounded, network.train()(x))
        network.block.linear2.weight_quantizer.enabled = False
        assert not torch.equal(network.eval()(x), rounded)
    assert notes(network) == {
        "block.self_attn": "stays in float: it computes with weights of its own",
        "block.self_attn.out_proj": "stays in float: NonDynamicallyQuantizableLinear has a forward of its own",
    }


def test_what_cannot_be_quantised_on_its_own_is_reported():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.unused = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.conv(x))

    network = prepare(Twice())
    assert notes(network) == {
        "conv": "called 2 times, so its output stays in float",
        "unused": "forward does not call it",
    }
    calibrate(network, batches(images(3, 4, 4)))


@pytest.mark.parametrize("make", [FunctionalResidual, PreActivation])
def test_functional_and_shared_activations_are_cut_off_by_the_quantiser_before(make):
    network, x = settled(make()), images(3, 16, 16)
    expected = network(x)
    calibrate(prepare(network), batches(x))
    assert (network(x) - expected).norm() / expected.norm() < 0.05
    assert notes(network) == {}


def test_weights_alone():
    network = prepare(CNN8(), QuantizationSpec(weight_bits=4, activation_bits=None))
    calibrate(network, batches(images(1, 28, 28)))
    assert not [name for name, _ in network.named_buffers() if "quantizer" in name]
    assert len(network.head.weight_quantizer(network.head.weight)[0].unique()) <= 15
    assert spec_of(network).weight_bits == 4


def test_learned_scales_are_parameters_of_the_network():
    network = prepare(CNN8(), QuantizationSpec(learned_scales=True))
    names = [name for name, _ in network.named_parameters() if "quantizer" in name]
    assert names == [f"{name}.weight_quantizer.scale" for name in ("block1.0", "block2.0", "block3.0", "head")]


def test_calibration_leaves_mode_gradients_and_batch_norm_as_they_were():
    network = prepare(CNN8()).train()
    mean = network.block1[1].running_mean.clone()
    calibrate(network, batches(images(1, 28, 28)), batches=1)
    assert network.training
    assert torch.equal(network.block1[1].running_mean, mean)
    assert float(network.block1[0].input_quantizer.count) == 1
    high = network.block1[0].input_quantizer.high.clone()
    network(3 * images(1, 28, 28))
    assert torch.equal(network.block1[0].input_quantizer.high, high)  # observers are off


def test_calibration_takes_whatever_batches_a_task_reads():
    network = prepare(CNN8())
    calibrate(network, [{"x": images(1, 28, 28), "labels": torch.zeros(32, dtype=torch.long)}])
    assert float(network.block1[0].input_quantizer.count) == 1


def test_an_empty_loader_is_an_error():
    with pytest.raises(ValueError, match="expected batches to calibrate with, got none: the loader is empty"):
        calibrate(prepare(CNN8()), [])


def test_ranges_that_are_no_numbers_or_hold_zero_alone_are_errors():
    with pytest.raises(ValueError, match=r"activations at 'block1.0' have the range nan to nan, expected numbers"):
        calibrate(prepare(CNN8()), batches(images(1, 28, 28) * float("inf")))
    with pytest.raises(ValueError, match=r"'block1.0' are 0 throughout, expected a range: .* skip=\('block1.0',\)"):
        calibrate(prepare(CNN8()), batches(images(1, 28, 28) * 0))
    network = prepare(CNN8())
    network.head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight of 'head' has scales that are not numbers: the network has diverged"):
        calibrate(network, batches(images(1, 28, 28)))


@pytest.mark.parametrize("activation_bits", [8, None])
def test_nan_to_calibrate_with_is_an_error_and_leaves_nothing_behind(activation_bits):
    network, x = prepare(CNN8(), QuantizationSpec(activation_bits=activation_bits)), images(1, 28, 28)
    x[20, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="expected numbers in batch 1 to calibrate with, got NaN in 1 of 16 samples"):
        calibrate(network, batches(x))
    again = calibrate(network, batches(images(1, 28, 28)))(images(1, 28, 28))
    assert again.isfinite().all()


def test_a_calibration_after_one_that_failed_finds_its_ranges():
    network, x = prepare(CNN8()), images(1, 28, 28)
    with pytest.raises(ValueError, match="range nan to nan"):
        calibrate(network, batches(x * float("inf")))
    calibrate(network, batches(x))
    assert float(network.block1[0].input_quantizer.low) == pytest.approx(float(x[:16].min() + x[16:].min()) / 2)


def test_the_state_holds_ranges_and_whether_it_is_on():
    network, x = prepare(settled(CNN8())), images(1, 28, 28)
    calibrate(network, batches(x))
    other = prepare(CNN8().eval())
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x), network(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(CNN8().state_dict())
