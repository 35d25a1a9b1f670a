"""AdamW on float32 weights, and the calls that every optimizer of a role answers."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from stage2_distill.distributed.dtensor import local_tensor
from stage2_distill.distributed.fsdp import clip_grad_norm

CHUNK_PARAMETERS = 16  # parameters updated by one call: few launches, and little memory for intermediate results


class RoleOptimizer(torch.optim.Optimizer):
    """An optimizer whose float32 parameters, plain or sharded, are their own master weights."""

    named: dict[str, nn.Parameter]  # what is trained

    def clip_gradients(self, limit: float) -> Tensor:
        """Scale the gradients of all ranks to a global norm of at most `limit`; returns the norm before, a scalar."""
        return clip_grad_norm(self.named.values(), limit)

    def step_if_finite(self, finite: Tensor) -> bool:
        """Take a step that changes nothing unless `finite`, a boolean on the device, without a wait on the host.

        Returns False if the optimizer cannot: then the caller checks on the host and calls `step`.
        """
        return False

    def master_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and float32 master weights, sharded as the parameters are, one at a time."""
        for name, parameter in self.named.items():
            yield name, parameter.detach()

    def remainders(self) -> dict[str, Tensor]:
        """By name the bits that the master weights have beyond the parameters; none if those are the masters."""
        return {}

    def state_tensors(self) -> dict[str, Tensor]:
        """The live tensors of the state as {parameter.slot: tensor}."""
        return {
            f"{name}.{slot}": value
            for name, parameter in self.named.items()
            for slot, value in self.state[parameter].items()
        }


class PlainAdamW(RoleOptimizer):
    """torch's AdamW with betas (0, b), bit for bit, in 4 bytes per parameter less.

    It stores no first moment, which would be the gradient itself. The state exists from the start, so that a checkpoint
    can fill it. settings: lr, beta2, eps, weight_decay.
    """

    def __init__(self, net: nn.Module, settings: dict[str, float]) -> None:
        super().__init__([p for p in net.parameters() if p.requires_grad], settings)
        self.named = trained_parameters(net)
        for parameter in self.named.values():
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        with_grad: list[Tensor] = [p for p in self.named.values() if p.grad is not None]
        for parameter in with_grad:
            self.state[parameter]["step"] += 1  # per parameter, as torch counts
        for start in range(0, len(with_grad), CHUNK_PARAMETERS):
            self.update_parameters(with_grad[start : start + CHUNK_PARAMETERS])

    def update_parameters(self, parameters: list[Tensor]) -> None:
        """Update some parameters; the order of operations is torch's, so that the bits are too."""
        group = self.param_groups[0]
        weights = [local_tensor(p) for p in parameters]
        moments = [local_tensor(self.state[p]["exp_avg_sq"]) for p in parameters]
        grads = [local_tensor(p.grad) for p in parameters if p.grad is not None]
        steps = [int(self.state[p]["step"]) for p in parameters]  # on the CPU: no wait for the GPU
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_mul_(moments, group["beta2"])
        torch._foreach_addcmul_(moments, grads, grads, 1 - group["beta2"])  # addcmul as torch: lerp rounds differently
        denominators = torch._foreach_sqrt(moments)
        torch._foreach_div_(denominators, [(1 - group["beta2"] ** step) ** 0.5 for step in steps])
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(weights, grads, denominators, -group["lr"])


class TorchAdamW(RoleOptimizer, torch.optim.AdamW):
    """torch's AdamW, for a first moment; its state exists from the start, so that a checkpoint can fill it."""

    def __init__(self, net: nn.Module, settings: dict[str, float], *, beta1: float) -> None:
        betas = (beta1, settings["beta2"])
        super().__init__(
            net.parameters(), settings["lr"], betas, eps=settings["eps"], weight_decay=settings["weight_decay"]
        )
        self.named = trained_parameters(net)
        for parameter in self.named.values():
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def trained_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with a gradient by name."""
    return {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
