"""What can be seen of a training that somebody else's project starts by itself."""

from typing import Any

from torch import Tensor, nn

from kd_lightning.namespaces import Callback


class Observer(Callback):
    """Keeps the module that was trained, what was logged, and the largest gradient of each parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.module: Any = None
        self.logged: dict[str, Tensor] = {}
        self.gradients: dict[str, float] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                largest = float(parameter.grad.abs().max())
                self.gradients[name] = max(self.gradients.get(name, 0.0), largest)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.module, self.logged = pl_module, dict(trainer.callback_metrics)

    def assert_trained_by(self, *terms: str, student: str = "") -> None:
        """Of a training with ``task_weight=0``, whose gradients are those of the distillation alone."""
        for term in terms:
            assert self.logged[f"train/loss/{term}"] > 0
        own = [size for name, size in self.gradients.items() if name.startswith(student)]
        assert max(own) > 0

    def assert_clean(self, fresh: nn.Module) -> None:
        """The module has the names of one that has never seen the callback, and nothing of the callback's."""
        assert list(self.module.state_dict()) == list(fresh.state_dict())
        assert [name for name, _ in self.module.named_modules()] == [name for name, _ in fresh.named_modules()]
        assert "training_step" not in vars(self.module)
