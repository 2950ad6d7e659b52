import copy

import pytest
import torch
from torch import nn

from kd_lightning import Teacher
from kd_lightning.tasks import Batch
from tests.tiny import assert_equal, good_teacher, network, samples, weights


def test_a_teacher_is_frozen_and_in_eval_mode_however_it_came() -> None:
    net = good_teacher(dropout=0.5).train()
    before, (x, _), teacher = weights(net), samples(8), Teacher(net)
    net.train()  # somebody's loop over all modules
    first, second = teacher(Batch((x,), {}, None)).logits, teacher(Batch((x,), {}, None)).logits
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert_equal(weights(net), before)


def test_outputs_can_be_saved_for_a_backward_pass() -> None:
    out = Teacher(good_teacher())(Batch((samples(4)[0],), {}, None), ["stem"])
    weight = torch.ones(4, 1, requires_grad=True)
    (weight * out.logits).sum().backward()  # inference tensors would raise here
    assert not out.features["stem"].is_inference()


def test_it_is_nobodys_child() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = Teacher(good_teacher())

    holder = Holder()
    assert not list(holder.parameters())
    assert not holder.state_dict()
    assert [*holder.modules()] == [holder]
    assert copy.deepcopy(holder).teacher.network is holder.teacher.network


def test_it_moves_to_another_precision_but_its_integers_do_not() -> None:
    teacher = Teacher(good_teacher())
    teacher.to(torch.device("cpu"), torch.bfloat16)
    assert teacher(Batch((samples(2)[0].bfloat16(),), {}, None)).logits.dtype == torch.bfloat16
    assert teacher.network.norm.num_batches_tracked.dtype == torch.int64


def test_weights_come_from_a_file(tmp_path) -> None:
    torch.save(good_teacher().state_dict(), tmp_path / "teacher.pt")
    loaded = Teacher(network(width=16), tmp_path / "teacher.pt")
    assert_equal(weights(loaded.network), weights(good_teacher()))


def test_a_file_of_another_network_is_refused(tmp_path) -> None:
    torch.save(good_teacher().state_dict(), tmp_path / "teacher.pt")
    with pytest.raises(ValueError, match=r"teacher\.pt does not fit Network: of another shape stem\.weight: \(16, 6\)"):
        Teacher(network(width=8), tmp_path / "teacher.pt")
