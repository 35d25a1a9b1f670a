"""The nano teacher: a WanTransformer3DModel trained by flow matching on a pool of encoded clips.

Shapes: B clips, C 48 channels, T 5 latent frames, H W latent size, N tokens, L text rows, D text width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from common.flow import add_noise, per_sample, shift
from examples.nano.graph import captured, optimizer, train
from examples.nano.text import WIDTH
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.transformer import convert_transformer

SHIFT = 5.0
DROPOUT, TEXT_ONLY = 0.10, 0.15  # shares of prompts replaced by the negative prompt, of samples without a first frame
RATE, EMA = 1e-3, 0.9998


@dataclass(frozen=True)
class Pool:
    """Encoded training clips on the device."""

    latents: Tensor  # (P C T H W) float16, normalised
    text: Tensor  # (P L D) float16, zero rows past each prompt's end
    negative: Tensor  # (L D) float16, the negative prompt

    def shortened(self, latent_frames: int) -> "Pool":
        """The same clips cut to their first latent frames: the VAE is causal, so this encodes their first frames."""
        return Pool(self.latents[:, :, :latent_frames], self.text, self.negative)


def make_dit() -> WanTransformer3DModel:
    """Return the nano denoiser with new weights and a zero output; its width exceeds a token's 192 latents."""
    net = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=8, attention_head_dim=32, in_channels=48, out_channels=48,
        text_dim=WIDTH, freq_dim=256, ffn_dim=640, num_layers=6, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", eps=1e-6, rope_max_seq_len=64,
    )  # fmt: skip
    torch.nn.init.zeros_(net.proj_out.weight)
    torch.nn.init.zeros_(net.proj_out.bias)
    return net


def velocity(net: WanTransformer3DModel, x: Tensor, sigma: Tensor, text: Tensor, pinned: Tensor) -> Tensor:
    """Return the velocity (B C T H W) at sigma (B); frame 0 has time 0 if `pinned` (B) is 1.

    The last of the text's L rows, a zero row, represents all up to 512: the same result for a sixteenth of the work.
    """
    return net(x, 1000 * torch.stack([sigma * (1 - pinned), sigma], dim=1), text, return_dict=False)[0]


def dit_loss(net: WanTransformer3DModel, pool: Pool, batch: int, generator: torch.Generator) -> Tensor:
    """Return the flow-matching loss of a random batch of the pool, over the free frames."""
    device = pool.latents.device
    index = torch.randint(len(pool.latents), (batch,), generator=generator, device=device)
    u, drop, alone = torch.rand((3, batch), generator=generator, device=device)
    x0 = pool.latents[index].float()
    eps = torch.randn(x0.shape, generator=generator, device=device)
    text = torch.where((drop < DROPOUT)[:, None, None], pool.negative, pool.text[index]).float()
    pinned = (alone >= TEXT_ONLY).float()
    sigma = shift(u, SHIFT)
    free = torch.ones_like(x0[:, :1, :, :1, :1])
    free[:, :, 0] -= per_sample(pinned)[:, :, 0]
    x_t = torch.where(free > 0, add_noise(x0, eps, sigma), x0)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
        v = velocity(net, x_t, sigma, text, pinned)
    return (free * (v.float() - (eps - x0)).square()).sum() / (free.sum() * x0[0, :, 0].numel())


def train_dit(
    folder: Path,
    pools: Sequence[Pool],
    *,
    seed: int,
    seconds: float,
    limit: int,
    batch: int,
    report: Callable[[str], None],
) -> int:
    """Train and save the teacher (EMA, float16), starting from `transformer/` if it exists; returns the iterations.

    pools: clips of one shape each, of which the iterations take turns.
    """
    device = pools[0].latents.device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make_dit().to(device)
    more = (folder / "transformer").exists()
    if more:
        net.load_state_dict(WanTransformer3DModel.from_pretrained(folder / "transformer").float().state_dict())
    convert_transformer(net, ExecutionPlan(compiled=device.type == "cuda"))
    parameters = list(net.parameters())
    average = [p.detach().clone() for p in parameters]
    generator = torch.Generator(device).manual_seed(seed + 1 + 1000 * more)  # not the draws of the first run
    adam = optimizer(parameters, device, beta2=0.99)
    loss = torch.ones((), device=device)

    def step(pool: Pool) -> Tensor:
        adam.zero_grad(set_to_none=True)
        value = dit_loss(net, pool, batch, generator)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - EMA)
        loss.lerp_(value.detach(), 0.01)
        return value

    steps = cycle([captured(partial(step, pool), generator) for pool in pools])  # a graph for each shape
    done = train(
        lambda: next(steps)(), adam.param_groups[0]["lr"], RATE,
        seconds=seconds, limit=limit, report=lambda i: report(f"dit {i} loss {loss.item():.4f}"),
    )  # fmt: skip
    for p, mean in zip(parameters, average, strict=True):
        p.data.copy_(mean)
    final = make_dit()
    final.load_state_dict(net.state_dict())
    final.half().save_pretrained(folder / "transformer", max_shard_size="6MB")
    return done
