import copy

import pytest
import torch
from torch import nn

from kd_lightning.borrowed_weights import BorrowedWeights
from tests.tiny import assert_equal, network, samples, weights


def borrowed(module: nn.Module) -> tuple[nn.Module, BorrowedWeights]:
    of = BorrowedWeights()
    return of.copy(module, {}), of


def memory(module: nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in module.parameters()}


def test_a_copy_has_the_weights_themselves_and_everything_else_of_its_own() -> None:
    module = network()
    module.names = ["a"]
    module.head.register_forward_hook(lambda *_: None)
    other, of = borrowed(module)
    assert memory(other) == memory(module)
    assert type(other) is type(module)
    assert other.names is not module.names
    assert other.norm.running_mean.data_ptr() != module.norm.running_mean.data_ptr()
    assert len(other.head._forward_hooks) == 1
    with of.kept_apart():
        other(samples(8)[0]).sum().backward()
    assert memory(other) == memory(module)  # nothing was written to
    assert module.head.weight.grad is None
    assert other.head.weight.grad is not None
    assert torch.equal(module.norm.running_mean, network().norm.running_mean)


@torch.no_grad()
def _foreach(module: nn.Module) -> None:
    torch._foreach_mul_(list(module.parameters()), 0.5)


def _load(module: nn.Module) -> None:
    module.load_state_dict(network(1).state_dict())


def _optimize(module: nn.Module) -> None:
    module(samples(8)[0]).sum().backward()
    torch.optim.AdamW(module.parameters(), lr=1.0, foreach=True).step()


def _assign(module: nn.Module) -> None:
    module.head.weight.data = module.head.weight.data + 1  # writes nowhere


WRITES = {
    "through .data": lambda module: module.head.weight.data.mul_(2),
    "through a view": lambda module: module.head.weight.detach().T[0].fill_(1),
    "an element": lambda module: module.head.weight.data.__setitem__(0, 1.0),
    "out": lambda module: torch.add(torch.ones(4), 1, out=module.head.bias.detach()),
    "several at once": _foreach,
    "an initialisation": lambda module: nn.init.zeros_(module.head.weight),
    "a state dict": _load,
    "an optimizer": _optimize,
    "an assignment": _assign,
    "a cast": lambda module: module.to(torch.bfloat16),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_a_copy_writes_is_its_own(write) -> None:
    module, plain = network(), network()
    expected = copy.deepcopy(plain)
    write(expected)
    other, of = borrowed(module)
    with of.kept_apart():
        write(other)
    assert_equal(weights(module), weights(plain))
    assert_equal(weights(other), weights(expected))
    assert not all(torch.equal(x, y) for x, y in zip(other.parameters(), module.parameters(), strict=True))
    with of.kept_apart():
        nn.init.ones_(other.head.weight)  # a second time
    assert_equal(weights(module), weights(plain))
    assert bool((other.head.weight == 1).all())


def test_the_bits_are_back_when_the_copy_fails() -> None:
    module = network()
    other, of = borrowed(module)

    def fail() -> None:
        with of.kept_apart():
            nn.init.zeros_(other.head.weight)
            raise KeyError("the user's")

    with pytest.raises(KeyError):
        fail()
    assert_equal(weights(module), weights(network()))


def test_tied_weights_stay_tied_and_views_of_one_memory_are_written_apart() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    both = torch.arange(32.0).reshape(2, 4, 4)
    module[0].weight.data, module[2].weight.data = both[0], both[1]
    other, of = borrowed(module)
    assert other[1].weight is other[0].weight
    with of.kept_apart():
        nn.init.zeros_(other[0].weight)
    assert torch.equal(both, torch.arange(32.0).reshape(2, 4, 4))
    assert not other[1].weight.any()
    assert torch.equal(other[2].weight, both[1])


def test_parameters_that_are_no_plain_tensors_are_copied() -> None:
    module = nn.ModuleDict({"lazy": nn.LazyLinear(3), "meta": nn.Linear(3, 3, device="meta"), "plain": nn.Linear(3, 3)})
    other, of = borrowed(module)
    with of.kept_apart():
        other["plain"](other["lazy"](torch.ones(2, 5)))
    assert isinstance(module["lazy"].weight, nn.UninitializedParameter)
    assert other["lazy"].weight.shape == (3, 5)


def test_weights_are_borrowed_anew_from_a_module_that_has_moved() -> None:
    module = network()
    other, of = borrowed(module)
    module.to(torch.float64)
    module.head = nn.Linear(8, 3)  # another one: stays as it was
    of.renew(other, module)
    assert other.stem.weight.dtype == torch.float64
    assert other.stem.weight.data_ptr() == module.stem.weight.data_ptr()
    assert other.head.weight.shape == (4, 8)
    with of.kept_apart():
        nn.init.zeros_(other.stem.weight)
    assert module.stem.weight.any()


def test_compiled_networks_run_as_they_were_written() -> None:
    module = network().eval()
    module.compile(backend="aot_eager")
    x = samples(8)[0]
    other, of = borrowed(module)
    with torch.compiler.set_stance("force_eager"), of.kept_apart():
        found = other(x)
    torch.testing.assert_close(found, module(x))
