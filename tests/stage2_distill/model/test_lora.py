"""Student and critic as adapters on one frozen base keep the guarantees of three networks."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.condition import Condition
from stage2_distill import build, train
from stage2_distill.checkpointing.format import load_checkpoint, newest_checkpoint
from stage2_distill.model.activation_checkpoint import block_runner
from stage2_distill.model.layers import ExecutionPlan, maybe_compile
from stage2_distill.model.lora import AdapterView, LoraSettings, add_adapters
from stage2_distill.model.wan import load_transformer, make_denoiser
from stage2_distill.sampling.student_sampler import load_merged, load_student
from stage2_distill.trainer import Roles
from tests.stage2_distill.training_helpers import make_config, make_shards, run_here, run_worker, tensors

LORA = {"lora_rank": 3, "lora_alpha": 6.0, "student_lr": 1e-2, "critic_lr": 1e-2, "iterations": 4}


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "data", model)


@pytest.fixture(scope="module")
def built_roles() -> list[Roles]:
    """The roles of the runs of this module."""
    return []


@pytest.fixture(scope="module")
def checkpoint(model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory, built_roles: list[Roles]) -> Path:
    """The last checkpoint of an uninterrupted run."""
    real = build.build_roles

    def record_roles(*arguments: object) -> Roles:
        built_roles.append(real(*arguments))
        return built_roles[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_roles", record_roles)
        out = tmp_path_factory.mktemp("lora") / "run"
        return run_here(make_config(shards, model, out, checkpoint_every=2, preview_every=4, preview_count=1, **LORA))


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    draws = torch.Generator().manual_seed(seed)
    condition = Condition(torch.randn(1, 48, 1, 4, 4, generator=draws), 9 * torch.randn(1, 512, 16, generator=draws))
    return torch.randn(1, 48, 3, 4, 4, generator=draws), torch.tensor([0.7]), condition


def base_weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")


def test_roles_share_one_frozen_base(checkpoint: Path, model: Path, built_roles: list[Roles]) -> None:
    roles = built_roles[0]
    assert roles.student.net.base is roles.teacher.base is roles.critic.net.base
    stored = base_weights(model)
    kept = {name: p for name, p in roles.teacher.base.named_parameters() if ".lora_" not in name}
    assert len(kept) == len(stored)
    for name, weight in kept.items():
        assert torch.equal(weight, stored[name.replace(".base_layer.", ".")]), name
        assert not weight.requires_grad
    assert list(roles.teacher.named_parameters()) == []


def test_only_adapters_are_trained_and_saved(checkpoint: Path) -> None:
    stored = tensors(checkpoint)
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in stored)
    assert {name.split(".")[0] for name in stored} == {
        "student", "critic", "ema", "student_optimizer", "critic_optimizer"
    }  # fmt: skip
    student = [name for name in stored if name.startswith("student.")]
    assert len(student) == 2 * 2 * 10, "two blocks, ten matrices, two factors"
    for name in student:
        critic, ema = stored[name.replace("student.", "critic.", 1)], stored[name.replace("student.", "ema.", 1)]
        assert stored[name].dtype == torch.float32
        assert stored[name].abs().max() > 0
        assert not torch.equal(stored[name], critic)
        assert not torch.equal(stored[name], ema)


def test_roles_start_as_the_base_and_diverge(model: Path) -> None:
    net = load_transformer(model, torch.float32)
    x_t, sigma, condition = inputs(0)
    before = make_denoiser(net, torch.float32)(x_t, sigma, condition)
    layers = add_adapters(net, ("student", "critic"), LoraSettings(3, 6.0))
    student, critic, teacher = (AdapterView(net, layers, name) for name in ("student", "critic", None))
    for role in (student, critic, teacher):
        torch.testing.assert_close(make_denoiser(role, torch.float32)(x_t, sigma, condition), before, rtol=0, atol=1e-6)
    with torch.no_grad():
        for _, weight in student.named_parameters():
            weight.normal_(generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(make_denoiser(student, torch.float32)(x_t, sigma, condition), before, atol=1e-2)
    for role in (critic, teacher):
        torch.testing.assert_close(make_denoiser(role, torch.float32)(x_t, sigma, condition), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep", ["full", "selective", "offload"])
def test_recomputed_blocks_use_the_same_adapter(model: Path, keep: str) -> None:
    """Other roles run between a role's forward and its backward pass, as in an update."""
    gradients = {}
    for plan in ("off", keep):
        net = load_transformer(model, torch.float32, ExecutionPlan(checkpointing=plan))
        layers = add_adapters(net, ("student", "critic"), LoraSettings(3, 6.0))
        student, critic, teacher = (AdapterView(net, layers, name) for name in ("student", "critic", None))
        with torch.no_grad():
            for role in (student, critic):
                for number, (_, weight) in enumerate(role.named_parameters()):
                    draws = torch.Generator().manual_seed(number + 100 * (role is critic))
                    weight.copy_(0.3 * torch.randn(weight.shape, generator=draws))
        x_t, sigma, condition = inputs(0)
        out = make_denoiser(student, torch.float32)(x_t, sigma, condition)
        with torch.no_grad():
            target = make_denoiser(critic, torch.float32)(x_t, sigma, condition)
            target = target - make_denoiser(teacher, torch.float32)(x_t, sigma, condition)
        ((out - target) ** 2).sum().backward()
        gradients[plan] = {name: weight.grad for name, weight in student.named_parameters()}
        assert all(weight.grad is None for _, weight in critic.named_parameters())
    for name, gradient in gradients["off"].items():
        if keep == "offload":  # adds the gradients of two halves of the tokens
            assert (gradients[keep][name] - gradient).norm() < 1e-5 * gradient.norm(), name
        else:
            torch.testing.assert_close(gradients[keep][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_all_adapters_share_compiled_graphs(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block with gradient (two pieces), without, and the base alone make four graphs; the numbers do not change."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # the graphs without their kernels
    graphs, results = torch._dynamo.utils.counters["stats"], {}
    for compiled in (False, True):
        block_runner.cache_clear()
        maybe_compile.cache_clear()
        torch._dynamo.reset()
        net = load_transformer(model, torch.float32, ExecutionPlan(checkpointing="full", compiled=compiled))
        layers = add_adapters(net, ("student", "critic"), LoraSettings(3, 6.0))
        roles = [AdapterView(net, layers, name) for name in ("student", "critic", None)]
        weights = [weight for role in roles for _, weight in role.named_parameters()]
        for number, weight in enumerate(weights):
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(number))
        before = graphs["unique_graphs"]
        with torch.no_grad():
            results[compiled] = [make_denoiser(role, torch.float32)(*inputs(0)) for role in roles]
        for role in roles[:2]:
            make_denoiser(role, torch.float32)(*inputs(0)).square().sum().backward()
        results[compiled] += [weight.grad for weight in weights]
    block_runner.cache_clear()
    maybe_compile.cache_clear()
    assert graphs["unique_graphs"] - before == 2 + 1 + 1 + 2, "two of the final norm"
    for one, two in zip(results[True], results[False], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_resumed_run_equals_uninterrupted_run(checkpoint: Path, model: Path, shards: Path, tmp_path: Path) -> None:
    options = LORA | {"checkpoint_every": 2, "preview_every": 4, "preview_count": 1}
    for iterations in (2, 4):
        resumed = run_here(make_config(shards, model, tmp_path / "run", **(options | {"iterations": iterations})))
    first, second = tensors(checkpoint), tensors(resumed)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_merged_weights_are_base_plus_adapter(checkpoint: Path, model: Path) -> None:
    """The weights follow the formula, and the merged network predicts what the base with its adapter does."""
    options = {"weights": "ema", "dtype": torch.float32, "device": torch.device("cpu")}
    merged = load_student(checkpoint, ExecutionPlan(), model=str(model), **options)
    stored, base = tensors(checkpoint), base_weights(model)
    weights = dict(merged.named_parameters())
    assert weights.keys() == base.keys()
    changed = 0
    for name, expected in base.items():
        factors = [f"ema.{name.removesuffix('.weight')}.lora_{factor}.weight" for factor in "AB"]
        if factors[0] in stored:
            a, b = (stored[factor] for factor in factors)
            expected = expected + 2.0 * b @ a  # alpha / rank = 6 / 3
            changed += 1
        torch.testing.assert_close(weights[name].detach(), expected, rtol=0, atol=1e-5)
    assert changed == 20
    unmerged = load_transformer(model, torch.float32)
    role = AdapterView(unmerged, add_adapters(unmerged, ("ema",), LoraSettings(3, 6.0)), "ema")
    load_checkpoint(checkpoint, {f"ema.{name}": value.data for name, value in role.named_parameters()})
    x_t, sigma, condition = inputs(3)
    with torch.no_grad():
        one, two = (make_denoiser(net, torch.float32)(x_t, sigma, condition) for net in (merged, role))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    plain = make_denoiser(load_transformer(model, torch.float32), torch.float32)(x_t, sigma, condition)
    assert not torch.allclose(plain, one, atol=1e-4)


def test_two_ranks_equal_one_process(model: Path, shards: Path, tmp_path: Path) -> None:
    """Sharded adapters on a sharded base, also with a bf16 base; accumulation, with and without first frames."""
    options = LORA | {"eps": 1e-2, "grad_clip": 1.0, "checkpoint_every": 4, "batch_size": 1}
    options |= {"text_only_fraction": 0.5, "first_frame_jitter": 0.5}
    one_process = run_here(make_config(shards, model, tmp_path / "one", **(options | {"batch_size": 4})))
    configs = [make_config(shards, model, tmp_path / "two", **options)]
    configs.append(make_config(shards, model, tmp_path / "half", **(options | {"dtype": "bfloat16"})))
    two_ranks, half = (newest_checkpoint(folder) for folder in run_worker(configs, 2, tmp_path))
    expected = tensors(one_process)
    loaded = {name: torch.zeros_like(value) for name, value in expected.items()}
    load_checkpoint(two_ranks, loaded)
    for role in ("student.", "critic.", "ema."):
        names = [name for name in expected if name.startswith(role)]
        error = sum((loaded[name] - expected[name]).square().sum() for name in names)
        assert (error / sum(expected[name].square().sum() for name in names)).sqrt() < 1e-6, role
    load_checkpoint(half, loaded)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in loaded.values())
    half_alone = make_config(
        shards, model, tmp_path / "half alone", **(options | {"batch_size": 4, "dtype": "bfloat16"})
    )
    expected = tensors(run_here(half_alone))  # FSDP2 casts the adapters of two ranks
    for name, value in expected.items():
        if name.startswith(("student.", "critic.")):
            assert (loaded[name] - value).norm() < 0.05 * value.norm(), name


def test_initial_adapters_depend_on_seed_and_name(model: Path) -> None:
    from stage2_distill.build import initialize_adapters

    nets = [load_transformer(model, torch.float32) for _ in range(2)]
    roles = [AdapterView(net, add_adapters(net, ("student",), LoraSettings(4, 4.0)), "student") for net in nets]
    for role, seed in zip(roles, (0, 1), strict=True):
        initialize_adapters(role, seed)
    (_, first), (_, other) = (next(iter(role.named_parameters())) for role in roles)
    assert first.abs().max() <= first.shape[1] ** -0.5
    assert not torch.equal(first, other)
    initialize_adapters(roles[1], 0)
    assert torch.equal(first, other)


def test_merging_removes_the_adapters(checkpoint: Path, model: Path) -> None:
    net = load_transformer(model, torch.float32)
    load_merged(net, checkpoint, "student", LoraSettings(3, 6.0))
    assert [name for name, _ in net.named_modules() if "lora" in name or "base_layer" in name] == []
