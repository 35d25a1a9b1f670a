"""The GPU kernels against the plain forms; skipped on a machine without a GPU."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks.ranks import MODEL, make_data
from common.video import VideoSpec
from stage2_distill.model.attention import choose_kernel, dot_product_attention, enable_determinism
from stage2_distill.model.layers import ExecutionPlan, apply_rotary_emb
from stage2_distill.model.transformer import convert_transformer
from stage2_distill.offload import activations
from tests.stage2_distill.training_helpers import make_config, make_shards, run_here, tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
NONDETERMINISTIC = "attention runs on cuDNN, which is not deterministic"


@pytest.fixture(autouse=True)
def reset_torch() -> Iterator[None]:
    """Restores torch's global settings after each test and drops its compiled graphs."""
    yield
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize(("width", "heads"), [(3072, 24), (24, 2)])
def test_norm_and_rotation(width: int, heads: int) -> None:
    from stage2_distill.model.fused_kernels import rms_norm_rope

    x, weight = torch.randn(2, 50, width, device="cuda"), torch.randn(width, device="cuda")
    cos, sin = torch.randn(2, 1, 50, 1, width // heads // 2, device="cuda")
    normed = torch.nn.functional.rms_norm(x.double(), (width,), weight.double(), 1e-6)
    exact = apply_rotary_emb(normed.unflatten(-1, (heads, -1)), (cos.double(), sin.double())).flatten(2)
    assert relative_error(rms_norm_rope(x, weight, cos, sin, 1e-6), exact) < 1e-6
    assert relative_error(rms_norm_rope(x.bfloat16(), weight, cos, sin, 1e-6), exact) < 4e-3


def test_linear_gelu() -> None:
    from stage2_distill.model.fused_kernels import linear_gelu

    x, w, b = (torch.randn(*shape, device="cuda") for shape in ((2, 50, 64), (256, 64), (256,)))
    exact = torch.nn.functional.gelu(x.double() @ w.double().t() + b.double(), approximate="tanh")
    assert relative_error(linear_gelu(x.bfloat16(), w.bfloat16(), b.bfloat16()), exact) < 8e-3


@pytest.mark.parametrize("kernel", ["auto", "cudnn", "flash", "efficient"])
@pytest.mark.parametrize("keys", [1500, 512])
def test_attention(kernel: str, keys: int) -> None:
    """Forward and backward pass, against float64."""
    torch.manual_seed(0)
    half = [torch.randn(1, n, 4, 128, device="cuda", dtype=torch.bfloat16) for n in (1500, keys, keys)]
    results = [x.requires_grad_() for x in half]
    exact = [x.detach().double().requires_grad_() for x in half]
    ours, theirs = dot_product_attention(*results, kernel), dot_product_attention(*exact, "math")
    pull = torch.randn_like(ours)
    grads = zip(
        torch.autograd.grad(ours, results, pull), torch.autograd.grad(theirs, exact, pull.double()), strict=True
    )
    assert max(relative_error(ours, theirs), *(relative_error(mine, other) for mine, other in grads)) < 4e-3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kernel", ["auto", "flash", "efficient"])
def test_gradients_are_deterministic(kernel: str, compiled: bool) -> None:
    from benchmarks.device import Case, inputs, random_network
    from benchmarks.network import backward_of

    fields = {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 1024, "text_dim": 64}
    chosen = Case(VideoSpec(33, 512, 512), torch.device("cuda"), torch.bfloat16, fields)
    net, results = convert_transformer(random_network(chosen), ExecutionPlan(kernel, "selective", compiled)), []
    run = backward_of(net, inputs(chosen))
    if not enable_determinism(kernel, chosen.dtype, chosen.device):
        pytest.skip(NONDETERMINISTIC)
    for _ in range(4):
        run()
        results.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_forward_passes_agree_with_and_without_gradient(compiled: bool) -> None:
    from benchmarks.device import Case, inputs, random_network

    fields = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 1024, "text_dim": 64}
    chosen = Case(VideoSpec(9, 64, 64), torch.device("cuda"), torch.bfloat16, fields)
    net, network_inputs = convert_transformer(random_network(chosen), ExecutionPlan(compiled=compiled)), inputs(chosen)
    with torch.no_grad():
        (without,) = net(**network_inputs, return_dict=False)
    (having,) = net(**network_inputs, return_dict=False)
    assert relative_error(without, having) < 1e-2


def test_compact_masters_equal_adamw() -> None:
    """100 steps at the recipe's rate and at a large one: every bit."""
    from stage2_distill.optim.compact_adamw import CompactAdamW

    for lr in (5e-7, 1e-3):
        half = torch.nn.Linear(512, 300, device="cuda", dtype=torch.bfloat16)
        full = torch.nn.Linear(512, 300, device="cuda")
        full.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
        settings = {"lr": lr, "eps": 1e-8, "weight_decay": 0.01}
        compact = CompactAdamW(half, settings | {"beta2": 0.999}, moment="float32")
        adamw = torch.optim.AdamW(full.parameters(), betas=(0.0, 0.999), foreach=False, **settings)
        for _ in range(100):
            for mine, theirs in zip(half.parameters(), full.parameters(), strict=True):
                mine.grad = 1e-3 * torch.randn_like(mine)
                theirs.grad = mine.grad.float()
            compact.step()
            adamw.step()
        for mine, theirs in zip(dict(compact.master_weights()).values(), full.parameters(), strict=True):
            assert torch.equal(mine, theirs), ((mine != theirs).float().mean().item(), lr)


@pytest.mark.parametrize("moment", ["float32", "8bit"])
def test_fused_update_equals_the_plain_one(moment: str) -> None:
    from stage2_distill.optim.compact_adamw import CompactAdamW, flat_local_state, update_parameter
    from stage2_distill.optim.compact_adamw_kernel import update_parameter_fused

    results = []
    for call in (update_parameter, update_parameter_fused):
        weight = torch.nn.Parameter(torch.randn(100, 192, generator=torch.Generator().manual_seed(0)).bfloat16().cuda())
        settings = {"lr": 1e-3, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
        compact = CompactAdamW(torch.nn.ParameterList([weight]), settings, moment=moment)
        (weight,) = compact.named.values()
        for step in range(1, 6):
            grad = torch.randn(19200, generator=torch.Generator().manual_seed(step)).bfloat16().cuda()
            place = torch.tensor([step, 0], device="cuda")
            coefficients = compact.step_coefficients(step, grad.device)
            packed = coefficients.pack() if call is update_parameter_fused else coefficients
            call(weight.data.view(-1), flat_local_state(compact.state[weight]), grad, packed, place)
        results.append(next(compact.master_weights())[1])
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
    assert (results[0] == results[1]).float().mean() > 0.9


@pytest.mark.parametrize("moment", ["float32", "8bit"])
def test_skipped_fused_step_changes_nothing(moment: str) -> None:
    from stage2_distill.optim.compact_adamw import CompactAdamW

    net = torch.nn.Linear(192, 100, device="cuda", dtype=torch.bfloat16)
    compact = CompactAdamW(net, {"lr": 1e-3, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}, moment=moment)
    for count, fine in enumerate((True, False, True)):
        before = [
            *dict(compact.master_weights()).values(),
            *(compact.state[p]["exp_avg_sq"].clone() for p in net.parameters()),
        ]
        for parameter in net.parameters():
            parameter.grad = (1 + count) * torch.randn_like(parameter)
        compact.clip_gradients(10.0)
        assert compact.step_if_finite(torch.tensor(fine, device="cuda"))
        after = [*dict(compact.master_weights()).values(), *(compact.state[p]["exp_avg_sq"] for p in net.parameters())]
        assert all(torch.equal(a, b) is not fine for a, b in zip(before, after, strict=True))


def test_offloaded_state_gives_equal_weights() -> None:
    from stage2_distill.optim.compact_adamw import CompactAdamW

    results = []
    for offload in (False, True):
        torch.manual_seed(0)
        sizes = [64 * (1 + n * 7 % 20) for n in range(20)]
        net = torch.nn.Sequential(*(torch.nn.Linear(256, n, device="cuda", dtype=torch.bfloat16) for n in sizes))
        settings = {"lr": 1e-3, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
        compact = CompactAdamW(net, settings, offload=offload)
        for _ in range(10):
            for parameter in net.parameters():
                parameter.grad = torch.randn_like(parameter)
            compact.step()
        assert compact.state[net[0].weight]["exp_avg_sq"].is_cuda is not offload
        results.append(list(dict(compact.master_weights()).values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_offloaded_activations_give_equal_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.device import Case, inputs, random_network
    from benchmarks.network import backward_of

    fields = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 1024, "text_dim": 64}
    chosen = Case(VideoSpec(17, 128, 128), torch.device("cuda"), torch.bfloat16, fields)
    net, given, found = random_network(chosen), inputs(chosen), []
    backward = backward_of(convert_transformer(net, ExecutionPlan(kernel="math", checkpointing="offload")), given)
    offloader = activations.ActivationOffloader
    offload = mock.Mock(side_effect=offloader.offload)
    monkeypatch.setattr(offloader, "offload", lambda *arguments: offload(*arguments))
    for saved_tensors in (offloader.saved_tensors, lambda *_: nullcontext()):
        monkeypatch.setattr(offloader, "saved_tensors", saved_tensors)
        backward()
        found.append([p.grad.clone() for p in net.parameters()])
        net.zero_grad()
    assert offload.call_count >= 2 * fields["num_layers"], "an input of each piece"
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def check_resumed_run(shards: Path, model: Path, folder: Path, **options: object) -> None:
    options |= {"dtype": "bfloat16", "optimizer_form": "compact", "device": "cuda", "global_batch": 2}
    options |= {"ema_start": 2, "rollout_reuse": True, "grad_clip": 1e6}
    uninterrupted = tensors(run_here(make_config(shards, model, folder / "whole", **options)))
    run_here(make_config(shards, model, folder / "half", **options, iterations=3))
    resumed = tensors(run_here(make_config(shards, model, folder / "half", **options)))
    assert uninterrupted.keys() == resumed.keys()
    assert [name for name, value in uninterrupted.items() if not torch.equal(value, resumed[name])] == []


@pytest.mark.parametrize("offload", ["average", "all"])
def test_resumed_run_equals_uninterrupted_run(model: Path, tmp_path: Path, offload: str) -> None:
    shards = make_shards(tmp_path / "data", model)
    check_resumed_run(shards, model, tmp_path, attention="math", offload=offload)


@pytest.mark.parametrize(
    ("kernel", "rows", "compiled"), [("auto", 512, True), ("auto", 32, True), ("flash", 32, False)]
)
def test_resumed_run_with_many_tokens(tmp_path: Path, kernel: str, rows: int, compiled: bool) -> None:
    if choose_kernel(kernel, half_on_gpu=True) == "cudnn":
        pytest.skip(NONDETERMINISTIC)
    spec = VideoSpec(33, 512, 512)  # 2304 tokens: several blocks of keys add to the gradient of a query
    size = {"num_frames": spec.num_frames, "height": spec.height, "width": spec.width, "fps": spec.fps}
    options = size | {"attention": kernel, "max_text_tokens": rows, "compile": compiled}
    data = make_data(tmp_path / "data", spec)
    check_resumed_run(data, MODEL, tmp_path, student_lr=1e-5, critic_lr=1e-5, **options)
