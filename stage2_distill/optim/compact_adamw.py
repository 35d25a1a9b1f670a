"""AdamW with betas (0, b) in few bytes a parameter, for weights that live in bf16.

Beside a bf16 weight (2 bytes) stand the 16 bits that its float32 master has more (2 bytes) and the second moment
(4, 2 or 1 bytes). With the first beta 0 the first moment is the gradient and needs none. 5 B parameters take 25 GB with
8-bit moments, where float32 AdamW takes 60 and a bf16 copy to compute with another 10.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import zeros as sharded_zeros

from stage2_distill.distributed.dtensor import first_element_index, global_grad_norm, local_tensor, sharded_like
from stage2_distill.model.split_float32 import join_master, split_master
from stage2_distill.offload.pinned_memory import PinnedPool
from stage2_distill.offload.prefetch import prefetched_groups
from stage2_distill.optim.quantized_moment import (
    BLOCK_SIZE,
    dequantize_blocks,
    hashed_uniform,
    is_quantizable,
    quantize_blocks,
    to_bf16,
)

if torch.cuda.is_available():  # triton comes with torch's CUDA builds only
    from stage2_distill.optim.compact_adamw_kernel import update_parameter_fused


MOMENT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": torch.uint8}


class UpdateFunction(Protocol):
    """The type of `advance`."""

    def __call__(
        self, weight: Tensor, state: dict[str, Tensor], grad: Tensor, coefficients: Tensor, step_offset: Tensor
    ) -> None:
        """Do the update."""


def update_parameter(
    weight: Tensor, state: dict[str, Tensor], grad: Tensor, coefficients: Tensor, step_offset: Tensor
) -> None:
    """One AdamW update of all elements (N) of one parameter, in place; the order of operations is torch's.

    rates: float32 (8): 1 - lr decay, -lr, beta2, 1 - beta2, sqrt(1 - beta2^step), eps, 1 / sqrt(1 - beta2^step), factor
    of the gradient; where that is not a number, nothing changes.
    place: int64 (2): step, number of the first element within the whole parameter.
    """
    decay_factor, minus_lr, beta2, one_minus_beta2, correction, eps, _, factor = coefficients.unbind()
    if factor.isnan():
        return
    grad = grad.float() * factor
    moment = torch.addcmul(read_second_moment(state) * beta2, one_minus_beta2 * grad, grad)
    write_second_moment(state, moment, step_offset)
    master = join_master(weight, state["remainder"]) * decay_factor
    master = master + (minus_lr * grad) / (moment.sqrt() / correction + eps)
    high, low = split_master(master)
    weight.copy_(high)
    state["remainder"].copy_(low)


def read_second_moment(state: dict[str, Tensor]) -> Tensor:
    """The second moment (N) in float32."""
    moment = state["exp_avg_sq"]
    if moment.dtype != torch.uint8:
        return moment.float()
    return dequantize_blocks(moment.view(-1, BLOCK_SIZE), state["exp_avg_sq_top"]).view(-1)


def write_second_moment(state: dict[str, Tensor], moment: Tensor, step_offset: Tensor) -> None:
    """Store the second moment (N)."""
    stored = state["exp_avg_sq"]
    if stored.dtype == torch.float32:
        stored.copy_(moment)
        return
    uniforms = hashed_uniform(moment.numel(), first_index=step_offset[1], step=step_offset[0])
    if stored.dtype == torch.bfloat16:
        stored.copy_(to_bf16(moment, uniforms))
        return
    codes, tops = quantize_blocks(moment.view(-1, BLOCK_SIZE), uniforms.view(-1, BLOCK_SIZE))
    stored.copy_(codes.view(-1))
    state["exp_avg_sq_top"].copy_(tops)


class CompactAdamW(torch.optim.Optimizer):
    """The optimizer; parameters are bf16, plain or sharded along dimension 0.

    settings: lr, beta2, eps, weight_decay. With `offload` the state lives in host memory: where each rank holds whole
    parameters.
    """

    def __init__(
        self,
        net: nn.Module,
        settings: dict[str, float],
        *,
        moment: str = "8bit",
        offload: bool = False,
        accumulate: bool = False,
    ) -> None:
        super().__init__([p for p in net.parameters() if p.requires_grad], settings)
        pool = PinnedPool(offload=offload)
        self.grad_factor: Tensor | None = None
        self.grad_sums: dict[Tensor, Tensor] = {}
        self.first_elements = {p: first_element_index(p) for p in self.trained_parameters()}
        for parameter in self.trained_parameters():
            assert parameter.dtype == torch.bfloat16, parameter.dtype
            initial = initial_state(parameter, MOMENT_DTYPES[moment])
            self.state[parameter] = {name: pool.place_tensor(value) for name, value in initial.items()}
            if accumulate:
                parameter.register_post_accumulate_grad_hook(self.add_gradient)

    def add_gradient(self, parameter: Tensor) -> None:
        """Add a gradient to its float32 sum: in bf16 a sum over many batches would lose the small ones."""
        assert parameter.grad is not None
        if parameter in self.grad_sums:
            self.grad_sums[parameter] += local_tensor(parameter.grad)
        else:
            self.grad_sums[parameter] = local_tensor(parameter.grad).float()
        parameter.grad = None

    def local_gradients(self) -> dict[Tensor, Tensor]:
        """This rank's gradients, of those parameters that have one."""
        new_gradients = {p: local_tensor(p.grad) for p in self.trained_parameters() if p.grad is not None}
        return new_gradients | self.grad_sums

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        super().zero_grad(set_to_none)
        self.grad_sums.clear()

    def trained_parameters(self) -> list[Tensor]:
        """What is trained."""
        return list(self.param_groups[0]["params"])

    @torch.no_grad()
    def clip_gradients(self, limit: float) -> Tensor:
        """The global gradient norm; the next step scales gradients to one of at most `limit`, in float32."""
        norm = global_grad_norm(list(self.local_gradients().values()), self.trained_parameters()[0])
        self.grad_factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        return norm

    def skip_step_unless(self, finite: Tensor) -> None:
        """Let the next step change nothing unless `fine`, a boolean on the device: nobody waits to look at it."""
        factor = torch.ones((), device=finite.device) if self.grad_factor is None else self.grad_factor
        self.grad_factor = torch.where(finite, factor, torch.nan)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        grads = self.local_gradients()
        for parameter in grads:
            self.state[parameter]["step"] += 1
        first = next(iter(grads))
        count = int(self.state[first]["step"])
        device = grads[first].device
        coefficients = self.step_coefficients(count, device)
        step = torch.tensor(count).to(device, non_blocking=True)
        update: UpdateFunction = update_parameter_fused if device.type == "cuda" else update_parameter
        states = prefetched_groups((flat_local_state(self.state[p]) for p in grads), device)
        for (parameter, grad), state in zip(grads.items(), states, strict=True):
            update(
                local_tensor(parameter).view(-1),
                state,
                grad.view(-1),
                coefficients,
                torch.stack([step, self.first_elements[parameter]]),
            )
        self.grad_factor = None

    def master_weights(self) -> Iterator[Tensor]:
        """The float32 masters of all parameters, one after the other, sharded as they are."""
        remainders = ({"low": local_tensor(self.state[p]["remainder"])} for p in self.trained_parameters())
        device = local_tensor(self.trained_parameters()[0]).device
        for parameter, remainder in zip(
            self.trained_parameters(), prefetched_groups(remainders, device, write_back=False), strict=True
        ):
            yield sharded_like(parameter, join_master(local_tensor(parameter.detach()), remainder["low"]))

    def step_coefficients(self, step: int, device: torch.device) -> Tensor:
        """The numbers of one step (8), float32."""
        group = self.param_groups[0]
        lr, beta2 = group["lr"], group["beta2"]
        correction = (1 - beta2**step) ** 0.5
        coefficients = [1 - lr * group["weight_decay"], -lr, beta2, 1 - beta2, correction, group["eps"], 1 / correction]
        factor = torch.ones((), device=device) if self.grad_factor is None else self.grad_factor
        return torch.cat([torch.tensor(coefficients).to(device, non_blocking=True), factor[None]])


def flat_local_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of a parameter's state as vectors, without the step."""
    return {name: local_tensor(value).view(-1) for name, value in state.items() if name != "step"}


def initial_state(parameter: Tensor, moment: torch.dtype) -> dict[str, Tensor]:
    """State before the first step, sharded as the parameter is."""
    moment_dtype = moment if is_quantizable(parameter.shape) else torch.float32
    state = {
        "step": torch.zeros((), dtype=torch.float32),
        "remainder": torch.zeros_like(parameter, dtype=torch.int16),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=moment_dtype),
    }
    if moment_dtype == torch.uint8:
        shape = (parameter.shape[0], parameter.shape[1:].numel() // BLOCK_SIZE)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            state["exp_avg_sq_top"] = sharded_zeros(shape, dtype=torch.int16, device_mesh=mesh, placements=placements)
        else:
            state["exp_avg_sq_top"] = torch.zeros(shape, dtype=torch.int16, device=parameter.device)
    return state
