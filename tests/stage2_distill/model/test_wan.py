"""`denoise` against diffusers' own pipelines, and against itself one sample at a time."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
from diffusers.utils import logging

from common.condition import Condition, frame_sigma, pin
from common.flow import timestep_sigmas, x0_from_velocity
from shards.record import pad_text
from stage2_distill.model.wan import denoise, guided, guided_pair, load_transformer, make_denoiser, rescale_guided
from tests.tiny_models import TEXT_DIM

SIZE = {"num_frames": 9, "height": 64, "width": 96}
SHAPE = (1, 48, 3, 4, 6)
logging.disable_progress_bar()


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def net(model: Path) -> torch.nn.Module:
    return load_transformer(model, torch.float32).eval()


@pytest.fixture
def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=5.0)


def euler(net: torch.nn.Module, noise: torch.Tensor, condition: Condition, sigmas: list[float]) -> list[torch.Tensor]:
    """Latents after each Euler step of the student's denoiser."""
    x_t, steps_seen = noise, []
    for now, following in zip(sigmas, sigmas[1:], strict=False):
        x0 = denoise(net, x_t, torch.tensor([now]), condition, dtype=torch.float32)
        x_t = pin(x_t, condition)
        x_t = x_t + (following - now) * (x_t - x0) / now
        steps_seen.append(x_t)
    return steps_seen


def through_pipeline(pipeline: torch.nn.Module, call: dict[str, object]) -> tuple[list[torch.Tensor], torch.Tensor]:
    steps_seen: list[torch.Tensor] = []

    def keep(_pipe: object, _step: int, _time: object, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps_seen.append(values["latents"].clone())
        return {}

    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        **call,
        **SIZE,
        guidance_scale=1.0,
        num_inference_steps=5,
        output_type="latent",
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["latents"],
    )
    return steps_seen, result.frames


def test_equals_the_image_to_video_pipeline(
    net: torch.nn.Module, model: Path, scheduler: FlowMatchEulerDiscreteScheduler
) -> None:
    vae = AutoencoderKLWan.from_pretrained(model / "vae").eval()
    pipeline = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=net, expand_timesteps=True
    )
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    noise, text = normal(*SHAPE, seed=1), normal(1, 512, TEXT_DIM, seed=2)
    steps_seen, final = through_pipeline(pipeline, {"image": image, "prompt_embeds": text, "latents": noise})
    with torch.no_grad():
        mode = vae.encode((2 * image - 1)[:, :, None]).latent_dist.mode()
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        condition = Condition((mode - mean) / std, text)
        ours = euler(net, noise, condition, scheduler.sigmas.tolist())
    assert len(steps_seen) == 5
    for mine, theirs in zip(ours, steps_seen, strict=True):
        torch.testing.assert_close(mine[:, :, 1:], theirs[:, :, 1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[-1], final, rtol=0, atol=1e-5)
    torch.testing.assert_close(final[:, :, :1], condition.first_frame, rtol=0, atol=1e-5)


def test_without_first_frame_equals_the_text_to_video_pipeline(
    net: torch.nn.Module, model: Path, scheduler: FlowMatchEulerDiscreteScheduler
) -> None:
    vae = AutoencoderKLWan.from_pretrained(model / "vae").eval()
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=net, expand_timesteps=True
    )
    noise, text = normal(*SHAPE, seed=3), normal(1, 512, TEXT_DIM, seed=4)
    steps_seen, final = through_pipeline(pipeline, {"prompt_embeds": text, "latents": noise})
    with torch.no_grad():
        ours = euler(net, noise, Condition(None, text), scheduler.sigmas.tolist())
    for mine, theirs in zip(ours, steps_seen, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[-1], final, rtol=0, atol=1e-5)


def test_batch_equals_its_samples_one_by_one(net: torch.nn.Module) -> None:
    condition = Condition(normal(3, 48, 1, 4, 6, seed=5), normal(3, 512, TEXT_DIM, seed=6))
    x_t, sigma = normal(3, *SHAPE[1:], seed=7), torch.tensor([1.0, 0.625, 0.02])
    with torch.no_grad():
        batch = denoise(net, x_t, sigma, condition, dtype=torch.float32)
        for i in range(3):
            one = Condition(condition.first_frame[i : i + 1], condition.text[i : i + 1])
            alone = denoise(net, x_t[i : i + 1], sigma[i : i + 1], one, dtype=torch.float32)
            torch.testing.assert_close(batch[i : i + 1], alone, rtol=0, atol=1e-5)


def test_first_frame_is_pinned_in_the_output(net: torch.nn.Module) -> None:
    condition = Condition(normal(1, 48, 1, 4, 6, seed=8), normal(1, 512, TEXT_DIM, seed=9))
    x_t = normal(*SHAPE, seed=10)
    other = x_t.clone()
    other[:, :, 0] = 7.0
    with torch.no_grad():
        first, second = (denoise(net, x, torch.tensor([0.5]), condition, dtype=torch.float32) for x in (x_t, other))
    assert torch.equal(first, second)
    assert torch.equal(first[:, :, :1], condition.first_frame)
    assert (other[:, :, 0] == 7.0).all(), "the input must stay as it is"


def test_first_frame_has_time_zero() -> None:
    sigma = torch.tensor([0.5, 0.9375])
    condition = Condition(torch.zeros(2, 48, 1, 4, 6), torch.zeros(2, 1, 1))
    assert frame_sigma(sigma, condition).tolist() == [[0.0, 0.5], [0.0, 0.9375]]
    assert frame_sigma(sigma, Condition(None, torch.zeros(2, 1, 1))).tolist() == [[0.5], [0.9375]]


def test_times_reach_the_network_unrounded(net: torch.nn.Module) -> None:
    """Sigma 0.9375 and 0.625 as bf16 times would arrive as 936 and 624, as the public code rounds them."""
    steps_seen: list[torch.Tensor] = []
    hook = net.register_forward_pre_hook(lambda _m, _a, kwargs: steps_seen.append(kwargs["timestep"]), with_kwargs=True)
    condition = Condition(None, torch.zeros(1, 512, TEXT_DIM))
    for sigma in timestep_sigmas((1000, 750, 500, 250), s=5.0):
        with torch.no_grad():
            denoise(net, torch.zeros(SHAPE), torch.tensor([sigma]), condition, dtype=torch.float32)
    hook.remove()
    assert [time[0, 0].item() for time in steps_seen] == pytest.approx([1000, 937.5, 833.33333, 625], rel=1e-6)
    assert all(time.dtype == torch.float32 for time in steps_seen)


def test_guidance_is_the_standard_form(net: torch.nn.Module) -> None:
    plain = make_denoiser(net, torch.float32)
    text, negative = normal(2, 512, TEXT_DIM, seed=11), normal(512, TEXT_DIM, seed=12)
    frame, x_t, sigma = normal(2, 48, 1, 4, 6, seed=13), normal(2, *SHAPE[1:], seed=14), torch.tensor([0.8, 0.3])
    with torch.no_grad():
        cond = plain(x_t, sigma, Condition(frame, text))
        uncond = plain(x_t, sigma, Condition(frame, negative.expand(2, -1, -1)))
        ours = guided(plain, negative_text=negative, scale=7.0)(x_t, sigma, Condition(frame, text))
    torch.testing.assert_close(ours, uncond + 7.0 * (cond - uncond), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, cond + 6.0 * (cond - uncond), rtol=0, atol=1e-5)
    assert guided(plain, negative_text=negative, scale=1.0) is plain
    with torch.no_grad():
        pair = guided_pair(plain, negative_text=negative, scale=7.0)(x_t, sigma, Condition(frame, text))
    assert torch.equal(pair[0], ours) and torch.allclose(pair[1], cond, atol=1e-5)


def test_rescaled_guidance_has_the_deviation_without_guidance() -> None:
    """All of it with share 1; with 0.25 three quarters of the way are left; a given frame counts nowhere."""
    frame = 9 + normal(2, 48, 1, 4, 6, seed=20)
    condition = Condition(frame, torch.zeros(2, 1, TEXT_DIM), given=torch.tensor([True, False]))
    cond, result = (pin(normal(2, 48, 3, 4, 6, seed=seed), condition) for seed in (21, 22))
    result = pin(4 * result + 0.5, condition)

    def deviation(x0: torch.Tensor) -> list[float]:
        return [x0[0, :, 1:].std(correction=0).item(), x0[1].std(correction=0).item()]

    before, without = deviation(result), deviation(cond)
    for share in (1.0, 0.25):
        found = rescale_guided(result, cond, condition, share=share)
        expected = [share * new + (1 - share) * old for old, new in zip(before, without, strict=True)]
        assert deviation(found) == pytest.approx(expected, rel=1e-4)
        assert torch.equal(found[0, :, 0], frame[0, :, 0])
        assert torch.allclose(found[1] / result[1], found[1, 0, 0, 0, 0] / result[1, 0, 0, 0, 0], rtol=1e-4)


def test_half_precision_keeps_rope_and_x0_in_float32(model: Path) -> None:
    half = load_transformer(model, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.rope.freqs_cos.dtype in (torch.float32, torch.float64)
    full = load_transformer(model, torch.float32)
    assert torch.equal(half.rope.freqs_cos, full.rope.freqs_cos)
    x_t, sigma = normal(*SHAPE, seed=15), torch.tensor([0.02])
    with torch.no_grad():
        x0 = denoise(half, x_t, sigma, Condition(None, torch.zeros(1, 512, TEXT_DIM)), dtype=torch.bfloat16)
    assert x0.dtype == torch.float32
    velocity = (x_t - x0) / 0.02
    torch.testing.assert_close(x0, x0_from_velocity(x_t, velocity, sigma))
    assert not torch.equal(x0, x0.bfloat16().float()), "x0 must not be rounded to bf16"


def test_fewer_text_rows_give_equal_numbers(net: torch.nn.Module) -> None:
    x_t, sigma = normal(2, *SHAPE[1:], seed=21), torch.tensor([0.9, 0.4])
    frame, text = normal(2, 48, 1, *SHAPE[3:], seed=22), torch.zeros(2, 512, TEXT_DIM)
    text[0, :5], text[1, :9] = normal(5, TEXT_DIM, seed=23), normal(9, TEXT_DIM, seed=24)
    full = denoise(net, x_t, sigma, Condition(frame, text), dtype=torch.float32)
    short = denoise(net, x_t, sigma, Condition(frame, text[:, :16]), dtype=torch.float32)
    torch.testing.assert_close(short, full, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="max_text_tokens=9: a prompt has 9 tokens; give at least 10"):
        pad_text(text[1, :9], 9)
