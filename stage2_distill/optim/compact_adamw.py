"""AdamW with betas (0, b) in few bytes per parameter, for weights stored in bf16.

Beside a bf16 weight (2 bytes) it stores the 16 bits that the float32 master weight has beyond it (2 bytes) and the
second moment (4 or 1 bytes). With the first beta 0 the first moment is the gradient and is not stored. 5 B parameters
take 25 GB with 8-bit moments; float32 AdamW takes 60 GB, and a bf16 copy to compute with another 10.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import zeros as sharded_zeros

from stage2_distill.distributed.dtensor import first_element_index, global_grad_norm, local_tensor, sharded_like
from stage2_distill.model.split_float32 import join_master, split_master
from stage2_distill.offload.pinned_memory import PinnedPool
from stage2_distill.offload.prefetch import prefetched_groups
from stage2_distill.optim.adamw import RoleOptimizer, trained_parameters
from stage2_distill.optim.quantized_moment import (
    BLOCK_SIZE,
    dequantize_blocks,
    hashed_uniform,
    is_quantizable,
    quantize_blocks,
)

if torch.cuda.is_available():  # triton comes with torch's CUDA builds only
    from stage2_distill.optim.compact_adamw_kernel import update_parameter_fused


@dataclass(frozen=True)
class StepCoefficients:
    """The numbers of one step: float32 scalars on the device."""

    decay_factor: Tensor  # 1 - lr * weight_decay
    minus_lr: Tensor
    beta2: Tensor
    one_minus_beta2: Tensor
    correction: Tensor  # sqrt(1 - beta2^step)
    eps: Tensor
    inverse_correction: Tensor
    grad_factor: Tensor  # scales the gradients to the clipped norm
    apply: Tensor  # boolean; if False, nothing changes

    def pack(self) -> Tensor:
        """The scalars (8) in the order of the GPU kernel, which changes nothing if the last one is NaN."""
        factor = torch.where(self.apply, self.grad_factor, torch.nan)
        rates = (self.decay_factor, self.minus_lr, self.beta2, self.one_minus_beta2)
        return torch.stack([*rates, self.correction, self.eps, self.inverse_correction, factor])


def update_parameter(
    weight: Tensor, state: dict[str, Tensor], grad: Tensor, coefficients: StepCoefficients, step_offset: Tensor
) -> None:
    """One AdamW update of all elements (N) of one parameter, in place; the order of operations is torch's.

    step_offset: int64 (2): step, index of the first element within the whole parameter.
    """
    if not coefficients.apply:  # free on the CPU; on a GPU it would wait, so the kernel looks at NaN
        return
    grad = grad.float() * coefficients.grad_factor
    moment = torch.addcmul(read_second_moment(state) * coefficients.beta2, coefficients.one_minus_beta2 * grad, grad)
    write_second_moment(state, moment, step_offset)
    master = join_master(weight, state["remainder"]) * coefficients.decay_factor
    master = master + (coefficients.minus_lr * grad) / (moment.sqrt() / coefficients.correction + coefficients.eps)
    high, low = split_master(master)  # bf16 rounded to nearest, and the rest
    weight.copy_(high)
    state["remainder"].copy_(low)


def read_second_moment(state: dict[str, Tensor]) -> Tensor:
    """The second moment (N) in float32."""
    moment = state["exp_avg_sq"]
    if moment.dtype == torch.float32:
        return moment
    return dequantize_blocks(moment.view(-1, BLOCK_SIZE), state["exp_avg_sq_top"]).view(-1)


def write_second_moment(state: dict[str, Tensor], moment: Tensor, step_offset: Tensor) -> None:
    """Store the second moment (N) in the format of the state."""
    stored = state["exp_avg_sq"]
    if stored.dtype == torch.float32:
        stored.copy_(moment)
        return
    uniforms = hashed_uniform(moment.numel(), first_index=step_offset[1], step=step_offset[0])
    codes, tops = quantize_blocks(moment.view(-1, BLOCK_SIZE), uniforms.view(-1, BLOCK_SIZE))
    stored.copy_(codes.view(-1))
    state["exp_avg_sq_top"].copy_(tops)


class CompactAdamW(RoleOptimizer):
    """The optimizer of bf16 parameters, plain or sharded along dimension 0.

    settings: lr, beta2, eps, weight_decay. moment: 8bit or float32. offload: the state lives in host memory, which
    needs whole parameters on each rank. accumulate: gradients of several backward passes are summed in float32.
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
        self.named = trained_parameters(net)
        pool = PinnedPool(offload=offload)
        self.grad_factor: Tensor | None = None
        self.apply_step: Tensor | None = None
        self.grad_sums: dict[nn.Parameter, Tensor] = {}
        self.first_elements = {p: first_element_index(p) for p in self.named.values()}
        for parameter in self.named.values():
            assert parameter.dtype == torch.bfloat16, parameter.dtype
            initial = initial_state(parameter, quantize=moment == "8bit")
            self.state[parameter] = {name: pool.place_tensor(value) for name, value in initial.items()}
            if accumulate:
                parameter.register_post_accumulate_grad_hook(self.add_gradient)

    def add_gradient(self, parameter: nn.Parameter) -> None:
        """Add a gradient to its float32 sum: a bf16 sum over many micro-batches would lose the small ones."""
        assert parameter.grad is not None
        if parameter in self.grad_sums:
            self.grad_sums[parameter] += local_tensor(parameter.grad)
        else:
            self.grad_sums[parameter] = local_tensor(parameter.grad).float()
        parameter.grad = None  # frees the bf16 gradient before the next one is computed

    def local_gradients(self) -> dict[nn.Parameter, Tensor]:
        """This rank's gradients, by the parameters that have one."""
        # sums take precedence: with `accumulate` no parameter has both
        new_gradients = {p: local_tensor(p.grad) for p in self.named.values() if p.grad is not None}
        return new_gradients | self.grad_sums

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients and their sums."""
        super().zero_grad(set_to_none)
        self.grad_sums.clear()

    @torch.no_grad()
    def clip_gradients(self, limit: float) -> Tensor:
        """The global gradient norm; the next step scales the gradients to one of at most `limit`, in float32."""
        norm = global_grad_norm(list(self.local_gradients().values()), next(iter(self.named.values())))
        self.grad_factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch's clip_grad_norm_
        return norm

    def step_if_finite(self, finite: Tensor) -> bool:
        """Take a step that changes nothing unless `finite`, a boolean on the device; returns True."""
        self.apply_step = finite
        self.step()
        return True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        grads = self.local_gradients()
        for parameter in grads:
            self.state[parameter]["step"] += 1
        first = next(iter(grads))
        count = int(self.state[first]["step"])  # equal for all: every parameter has a gradient in every update
        device = grads[first].device
        coefficients = self.step_coefficients(count, device)
        packed = coefficients.pack()
        step = torch.tensor(count).to(device, non_blocking=True)
        states = prefetched_groups((flat_local_state(self.state[p]) for p in grads), device)
        for (parameter, grad), state in zip(grads.items(), states, strict=True):
            weight, step_offset = local_tensor(parameter).view(-1), torch.stack([step, self.first_elements[parameter]])
            if device.type == "cuda":
                update_parameter_fused(weight, state, grad.view(-1), packed, step_offset)
            else:
                update_parameter(weight, state, grad.view(-1), coefficients, step_offset)
        self.grad_factor = self.apply_step = None  # valid for one step

    def master_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and float32 master weights, sharded as the parameters are, one at a time."""
        remainders = ({"low": local_tensor(low)} for low in self.remainders().values())
        device = local_tensor(next(iter(self.named.values()))).device
        groups = prefetched_groups(remainders, device, write_back=False)
        for (name, parameter), group in zip(self.named.items(), groups, strict=True):
            yield name, sharded_like(parameter, join_master(local_tensor(parameter.detach()), group["low"]))

    def remainders(self) -> dict[str, Tensor]:
        """By name the 16 bits that each master weight has beyond its bf16 weight, int16."""
        return {name: self.state[parameter]["remainder"] for name, parameter in self.named.items()}

    def step_coefficients(self, step: int, device: torch.device) -> StepCoefficients:
        """The numbers of step `step`, counted from 1."""
        group = self.param_groups[0]
        lr, beta2 = group["lr"], group["beta2"]
        correction = (1 - beta2**step) ** 0.5
        rates = [1 - lr * group["weight_decay"], -lr, beta2, 1 - beta2, correction, group["eps"], 1 / correction]
        scalars = torch.tensor(rates).to(device, non_blocking=True).unbind()  # float64 on the host, one copy for all
        factor = torch.ones((), device=device) if self.grad_factor is None else self.grad_factor
        apply = torch.ones((), device=device, dtype=torch.bool) if self.apply_step is None else self.apply_step
        return StepCoefficients(*(*scalars, factor, apply))


def flat_local_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of a parameter's state as vectors, without the step."""
    return {name: local_tensor(value).view(-1) for name, value in state.items() if name != "step"}


def initial_state(parameter: Tensor, *, quantize: bool) -> dict[str, Tensor]:
    """State before the first step, sharded as the parameter is; rows that are no whole blocks stay float32."""
    quantize = quantize and is_quantizable(parameter.shape)
    state = {
        "step": torch.zeros((), dtype=torch.float32),  # a float on the CPU, as torch's AdamW stores it
        "remainder": torch.zeros_like(parameter, dtype=torch.int16),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.uint8 if quantize else torch.float32),
    }
    if quantize:
        # tops follow the rows, so that they are sharded with their codes
        shape = (parameter.shape[0], parameter.shape[1:].numel() // BLOCK_SIZE)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            state["exp_avg_sq_top"] = sharded_zeros(shape, dtype=torch.int16, device_mesh=mesh, placements=placements)
        else:
            state["exp_avg_sq_top"] = torch.zeros(shape, dtype=torch.int16, device=parameter.device)
    return state
