"""Knowledge Distillation with the Reused Teacher Classifier (Chen et al., CVPR 2022), https://arxiv.org/abs/2203.14001."""

from collections import OrderedDict
from copy import deepcopy

from torch import Tensor, nn

from kd_lightning.dry_forward import dry_forward
from kd_lightning.losses.base import FeatureLoss
from kd_lightning.losses.features import check_same_kind, same_size
from kd_lightning.losses.hint import hint
from kd_lightning.outputs import Outputs, find_layer


class SimKD(FeatureLoss):
    """The student learns the teacher's features alone, and answers through the teacher's own classifier.

    Before training, the student's architecture is changed for good: a projector of three convolutions (linear layers
    for vectors), each with batch norm and ReLU, is appended to the student's layer, and a frozen copy of the teacher's
    classifier takes the place of the student's. Both are in the checkpoint and in what is exported. The term is the
    mean squared error between the projected features and the teacher's; the authors use no other. What the student
    does between the layer and its classifier (pooling) has to be what the teacher does.

    Args:
        student_layer: The last one before the classifier, of maps before pooling as in the paper, or of vectors.
        teacher_layer: Likewise; the student's name unless given.
        student_classifier: Name of the student's module that is replaced.
        teacher_classifier: Name of the teacher's module that replaces it; the student's name unless given.
        reduction: The projector's inner layers have this part of the teacher's channels; the paper's r.
        weight: Factor of the term.

    Raises:
        ValueError: For layers of different kinds, or a reduction that leaves no channel.

    Example::

        # A checkpoint is loaded into the changed architecture:
        loss = SimKD("layer3", student_classifier="fc")
        student = loss.change(resnet8x4(), resnet32x4(), torch.zeros(2, 3, 32, 32))
        student.load_state_dict(load_student("last.ckpt"))
    """

    changes_student = True
    needs_teacher_network = True

    def __init__(
        self,
        student_layer: str,
        teacher_layer: str | None = None,
        student_classifier: str = "fc",
        teacher_classifier: str | None = None,
        reduction: int = 2,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        if reduction < 1:
            raise ValueError(f"expected reduction of 1 or more, got {reduction}: 2 halves the channels")
        self.student_classifier = student_classifier
        self.teacher_classifier = teacher_classifier or student_classifier
        self.reduction = reduction
        self._projector: list[nn.Module] = []  # handed on to the student: it is in no loss's parameters

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        assert teacher is not None
        s, t = self.features(student, teacher)
        check_same_kind(s, t, "simkd")
        self._projector = [_projector(s, t, self.reduction)]

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None:
        assert teacher is not None
        replaced = find_layer(student, self.student_classifier)
        if isinstance(replaced, _ReusedClassifier):
            return  # changed before, by change() or by an earlier training
        place = next(student.parameters())
        classifier = _ReusedClassifier(deepcopy(find_layer(teacher, self.teacher_classifier)))
        layer = OrderedDict(layer=find_layer(student, self.student_layers[0]), projector=self._projector.pop())
        _replace(student, self.student_layers[0], nn.Sequential(layer).to(place.device, place.dtype))
        _replace(student, self.student_classifier, classifier.to(place.device, place.dtype))

    def change(self, student: nn.Module, teacher: nn.Module, inputs: Tensor) -> nn.Module:
        """Change a student by hand, as is done before training; return it.

        Shape: inputs (B, ...), a batch that both networks take.
        """
        outputs = dry_forward("student", student, (inputs,), {}, self.student_layers)
        self.build(outputs, dry_forward("teacher", teacher, (inputs,), {}, self.teacher_layers))
        self.attach(student, teacher)
        return student

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        # The layer ends with its projector now.
        return hint(*same_size(*self.features(student, teacher)))


class _ReusedClassifier(nn.Sequential):
    """A teacher's classifier in a student: frozen, and in eval mode whatever the student is in."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__(classifier)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "_ReusedClassifier":
        return super().train(False)


def _projector(student: Tensor, teacher: Tensor, reduction: int) -> nn.Sequential:
    channels = 1 if student.ndim == 4 else -1
    inner = teacher.shape[channels] // reduction
    if inner < 1:
        raise ValueError(f"the teacher's layer has {teacher.shape[channels]} channels, expected {reduction} or more")
    widths = [student.shape[channels], inner, inner, teacher.shape[channels]]
    layers: list[nn.Module] = []
    for before, after, kernel in zip(widths, widths[1:], (1, 3, 1), strict=False):
        if student.ndim == 4:
            convolution = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        else:
            layers += [nn.Linear(before, after, bias=False), _norm(student, after), nn.ReLU()]
    return nn.Sequential(*layers)


def _norm(student: Tensor, channels: int) -> nn.Module:
    # Batch norm takes the channels of tokens (B, S, D) for positions.
    return nn.LayerNorm(channels) if student.ndim == 3 else nn.BatchNorm1d(channels)


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(network.get_submodule(owner), last, module)
