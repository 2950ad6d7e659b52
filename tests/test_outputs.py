from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from torch import nn

from kd_lightning.outputs import capture, find_layer, logits_of, nearest_layers, run
from tests.tiny import network, samples


def hooks(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


class Block(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv, self.relu, self.unused = nn.Conv2d(1, 2, 3), nn.ReLU(inplace), nn.Linear(1, 1)
        self.pair = nn.LSTM(1, 1)

    def forward(self, x):
        y = self.relu(self.conv(x))
        self.pair(y.flatten()[:, None])
        return self.relu(y).mean((2, 3))


def test_named_layers_come_along_with_the_logits() -> None:
    net, (x, _) = network().eval(), samples(5)
    logits, features, samples_, *_ = run(net, (x,), {}, ["norm", "stem"])
    assert samples_ is None  # a network does not know which samples it got
    assert torch.equal(logits, net(x))
    assert torch.equal(features["stem"], net.stem(x))
    assert torch.equal(features["norm"], net.norm(net.stem(x)))
    assert set(features) == {"norm", "stem"}


def test_a_layer_named_twice_is_tapped_once() -> None:
    assert set(run(network(), (samples(5)[0],), {}, ["stem", "stem"]).features) == {"stem"}


def test_keyword_arguments_reach_the_network() -> None:
    net, (x, _) = network().eval(), samples(5)
    assert torch.equal(run(net, (), {"x": x}).logits, net(x))


def test_gradients_flow_through_a_tapped_layer() -> None:
    net = network()
    run(net, (samples(5)[0],), {}, ["stem"]).features["stem"].sum().backward()
    assert net.stem.weight.grad.any()
    assert net.head.weight.grad is None


@pytest.mark.parametrize("layers", [["stem"], ["nothing"], []])
@pytest.mark.parametrize("features", [6, 7])
def test_no_hook_stays_behind_whatever_happens(layers: list[str], features: int) -> None:
    net = network()
    try:
        run(net, (torch.zeros(4, features),), {}, layers)
    except (ValueError, RuntimeError):
        assert layers == ["nothing"] or features == 7
    else:
        assert layers != ["nothing"]
        assert features == 6
    assert hooks(net) == 0


def test_an_unknown_layer_names_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"Network has no layer 'steam'.*nearest: stem, ") as error:
        run(network(), (samples(5)[0],), {}, ["steam"])
    assert "norm" in str(error.value)
    assert nearest_layers(network(), "hed")[0] == "head"


def test_nested_layers_are_found_by_their_dotted_name() -> None:
    net = nn.Sequential(network(), nn.Identity())
    assert find_layer(net, "0.stem") is net[0].stem


def test_an_output_that_is_overwritten_in_place_is_refused_and_the_later_layer_is_right() -> None:
    net, x = Block(inplace=True), torch.randn(2, 1, 5, 5)
    with pytest.raises(RuntimeError, match=r"output of layer 'conv' was overwritten in place.*tap that later layer"):
        run(net, (x,), {}, ["conv"])
    assert hooks(net) == 0
    run(Block(inplace=False), (x,), {}, ["conv"])


def test_a_layer_that_runs_twice_is_refused() -> None:
    net = Block()
    with pytest.raises(RuntimeError, match=r"layer 'relu' ran several times.*name a layer that runs once"):
        run(net, (torch.randn(2, 1, 5, 5),), {}, ["relu"])
    assert hooks(net) == 0


def test_a_layer_that_does_not_run_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"layer 'unused' did not run"):
        run(Block(), (torch.randn(2, 1, 5, 5),), {}, ["unused"])


def test_a_layer_that_returns_no_tensor_is_refused() -> None:
    net = Block()
    with pytest.raises(TypeError, match=r"layer 'pair' returns tuple, expected a tensor"):
        run(net, (torch.randn(2, 1, 5, 5),), {}, ["pair"])
    assert hooks(net) == 0


def test_a_capture_serves_one_pass_and_the_next_one_is_fresh() -> None:
    net = network().eval()
    first = run(net, (torch.zeros(2, 6),), {}, ["stem"]).features["stem"].clone()
    second = run(net, (torch.ones(2, 6),), {}, ["stem"]).features["stem"]
    assert torch.equal(first, net.stem(torch.zeros(2, 6)))
    assert torch.equal(second, net.stem(torch.ones(2, 6)))
    with capture(net, ["stem"]) as found:
        net(torch.zeros(2, 6))
    assert torch.equal(found["stem"], first)


@pytest.mark.parametrize("wrap", [lambda z: z, lambda z: {"logits": z}, lambda z: SimpleNamespace(logits=z, loss=None)])
def test_logits_are_found_in_what_networks_return(wrap) -> None:
    z = torch.randn(2, 3)
    assert logits_of(wrap(z)) is z


@pytest.mark.parametrize("output", [(torch.zeros(2), torch.zeros(2)), {"out": torch.zeros(2)}, None])
def test_other_outputs_are_refused(output: object) -> None:
    with pytest.raises(TypeError, match=rf"got an? {type(output).__name__}.*: wrap the network"):
        logits_of(output)


def test_a_compiled_network_gives_the_layers_of_each_call() -> None:
    """Takes some 15 s. Each call's features are its own, with and without taps, and gradients pass through them."""
    eager, compiled, (x, _) = network().eval(), network().eval(), samples(8)
    compiled.compile(backend="aot_eager")
    for shift in (0.0, 1.0, 2.0):
        assert torch.allclose(run(compiled, (x + shift,), {}).logits, eager(x + shift), atol=1e-6)
        found, expected = (run(net, (x + shift,), {}, ["stem", "act"]) for net in (compiled, eager))
        # The compiler may fuse operations, and so round differently.
        torch.testing.assert_close(dict(found.features), dict(expected.features), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)
    found.features["act"].sum().backward()
    expected.features["act"].sum().backward()
    torch.testing.assert_close(compiled.stem.weight.grad, eager.stem.weight.grad, rtol=1e-5, atol=1e-6)
    assert hooks(compiled) == 0


def test_a_network_compiled_and_called_by_somebody_else_tells_what_to_do() -> None:
    """PyTorch's default is to leave out hooks that come after the first call; only calls through run() undo that."""
    net, (x, _) = network().eval(), samples(8)
    net.compile(backend="eager")
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        net(x)
    with pytest.raises(RuntimeError, match=r"layer 'stem' did not run.*call torch\.compiler\.reset\(\)"):
        run(net, (x,), {}, ["stem"])
    torch.compiler.reset()
    assert torch.equal(run(net, (x,), {}, ["stem"]).features["stem"], net.stem(x))
