"""AdamW with betas (0, b) over float32 weights, which keeps no first moment: it would be the gradient itself."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from stage2_distill.distributed.dtensor import local_tensor

CHUNK_PARAMETERS = 16  # parameters updated by one call: few launches, and little memory for what is between


class PlainAdamW(torch.optim.Optimizer):
    """The numbers of torch's AdamW, bit by bit, in 4 bytes a parameter less; its state is made at once.

    settings: lr, beta2, eps, weight_decay. Parameters are plain or sharded.
    """

    def __init__(self, net: nn.Module, settings: dict[str, float]) -> None:
        super().__init__([p for p in net.parameters() if p.requires_grad], settings)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        with_grad = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        for parameter in with_grad:
            self.state[parameter]["step"] += 1
        for chunk in parameter_chunks(with_grad):
            self.update_parameters(chunk)

    def update_parameters(self, parameters: list[Tensor]) -> None:
        """Update some parameters; the order of operations is torch's."""
        group = self.param_groups[0]
        weights = [local_tensor(p) for p in parameters]
        moments = [local_tensor(self.state[p]["exp_avg_sq"]) for p in parameters]
        grads = [local_tensor(p.grad) for p in parameters if p.grad is not None]
        steps = [int(self.state[p]["step"]) for p in parameters]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_mul_(moments, group["beta2"])
        torch._foreach_addcmul_(moments, grads, grads, 1 - group["beta2"])
        denominators = torch._foreach_sqrt(moments)
        torch._foreach_div_(denominators, [(1 - group["beta2"] ** step) ** 0.5 for step in steps])
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(weights, grads, denominators, -group["lr"])


def parameter_chunks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """A few at a time."""
    for start in range(0, len(parameters), CHUNK_PARAMETERS):
        yield parameters[start : start + CHUNK_PARAMETERS]
