"""How far a critic drifts from the teacher on true clips, where the right critic is the teacher itself.

    python -m examples.nano.critic_error --device cuda

The teacher cannot be told from the world, so a student that was perfect would make true clips, and the gradient of
DMD, critic minus teacher, would be zero. What a critic that is trained on true clips shows instead is its own error,
which training takes for the student's. Prints rms(critic - teacher) / rms(x0 - teacher) by sigma for each rate.
Shapes: N clips, B batch, C channels, T latent frames, H W latent size.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from common.condition import Condition, Denoiser, free_mean
from common.flow import add_noise, score_sigma
from examples.nano.build import Texts
from examples.nano.captions import NEGATIVE_PROMPT
from examples.nano.dit import SHIFT
from examples.nano.gate import Conditions, make_conditions
from stage2_distill.dmd.losses import critic_loss
from stage2_distill.model.wan import load_transformer, make_denoiser
from stage2_distill.optim.adamw import PlainAdamW

SIGMAS = (0.05, 0.2, 0.5, 0.9)
HELD_OUT = 1024  # clips that the critic is not trained on


def draw_batches(clips: Conditions, size: int, seed: int) -> Iterator[tuple[Tensor, Condition, Tensor, Tensor]]:
    """Yield x0 (B C T H W), its condition, sigma (B) and eps without end, from the clips that are not held out."""
    generator = torch.Generator(clips.real.device).manual_seed(seed)
    draws = {"generator": generator, "device": clips.real.device}
    while True:
        index = torch.randint(HELD_OUT, len(clips.real), (size,), **draws)
        x0 = clips.real[index]
        sigma = score_sigma(torch.rand(size, **draws), s=SHIFT)
        yield x0, Condition(clips.first[index], clips.text[index]), sigma, torch.randn(x0.shape, **draws)


def train_critic(folder: Path, clips: Conditions, *, rate: float, cooldown: int, args: argparse.Namespace) -> Denoiser:
    """A critic trained on true clips as `recipes/nano.yaml` trains it, with falling rates at the end if `cooldown`."""
    net = load_transformer(folder, torch.float32).to(clips.real.device)
    critic, optimizer = (
        make_denoiser(net, torch.float32),
        PlainAdamW(net, {"lr": rate, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}),
    )
    batches = draw_batches(clips, args.batch, args.seed)
    for iteration in range(args.iterations):
        x0, condition, sigma, eps = next(batches)
        critic_loss(x0, condition, critic=critic, sigma=sigma, eps=eps, kind="flow").backward()
        optimizer.clip_gradients(10.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (args.iterations - iteration) / cooldown if cooldown else 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return critic


@torch.no_grad()
def relative_error(critic: Denoiser, teacher: Denoiser, clips: Conditions, sigma: float, seed: int) -> float:
    """rms(critic - teacher) / rms(x0 - teacher) over the held-out clips, in their free frames."""
    x0, condition = clips.real[:HELD_OUT], Condition(clips.first[:HELD_OUT], clips.text[:HELD_OUT])
    generator = torch.Generator(x0.device).manual_seed(seed)
    sigmas = torch.full((len(x0),), sigma, device=x0.device)
    x_t = add_noise(x0, torch.randn(x0.shape, generator=generator, device=x0.device), sigmas)
    real, fake = teacher(x_t, sigmas, condition), critic(x_t, sigmas, condition)
    gap, error = (free_mean((x - real).square(), condition).mean() for x in (fake, x0))
    return float((gap / error).sqrt())


def main() -> None:
    """Train a critic per learning rate and print its error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("examples/nano/model"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clips", type=int, default=16384)
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 5e-5, 1e-5])
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    device = torch.device(args.device)
    texts, vae = Texts(args.model, device), AutoencoderKLWan.from_pretrained(args.model / "vae").float().to(device)
    clips = make_conditions(vae, texts, texts([NEGATIVE_PROMPT]), HELD_OUT + args.clips, 256)
    teacher = make_denoiser(load_transformer(args.model, torch.float32).to(device), torch.float32)
    print("| learning rate | last half falls to 0 | " + " | ".join(f"sigma {sigma}" for sigma in SIGMAS) + " |")
    print("|---" * (len(SIGMAS) + 2) + "|")
    for rate in args.rates:
        for cooldown in (0, args.iterations // 2):
            critic = train_critic(args.model, clips, rate=rate, cooldown=cooldown, args=args)
            errors = [relative_error(critic, teacher, clips, sigma, args.seed) for sigma in SIGMAS]
            cells = " | ".join(f"{error:.3f}" for error in errors)
            print(f"| {rate:g} | {'yes' if cooldown else 'no'} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
