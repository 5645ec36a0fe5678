"""Grids on the scale of z: what is measured, when it takes effect, and that nothing moves at that moment."""

import copy
import importlib
import io

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import Adafactor, LlamaConfig, LlamaForCausalLM

from lslora import LSLoraConfig, Spline, calibration, spline_penalty
from lslora.diagnostics import observe_occupancy, spline_records
from lslora.records import live_intervals

STEPS = 4


def made(config_class=LSLoraConfig, **settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    if config_class is LSLoraConfig:
        settings = {"calibration_steps": STEPS, "extrapolation": "linear", **settings}
    return get_peft_model(net, config_class(r=4, lora_alpha=8, target_modules=["0", "2"], **settings))


def splines(model):
    return [module for module in model.modules() if isinstance(module, Spline)]


def batches(count=12):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(32, 8, generator=generator), torch.randn(32, 3, generator=generator)) for _ in range(count)]


def train(model, rows, lr=1e-2, forward=None, after_step=None):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for x, y in rows:
        loss = ((forward or model)(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if after_step:
            after_step()
    return losses


@pytest.mark.parametrize("placement", ["output", "bottleneck", "weight"])
def test_until_then_it_is_plain_lora_and_at_that_moment_nothing_moves(placement):
    plain, ours = made(LoraConfig), made(placement=placement)
    rows = batches()
    assert train(ours, rows[:STEPS]) == pytest.approx(train(plain, rows[:STEPS]), rel=1e-6)
    assert all(spline.is_calibrated for spline in splines(ours))
    x = rows[-1][0]
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-6)


def watched(model):
    """A list that fills with the |z| that the first spline is given."""
    seen = []
    splines(model)[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().abs().flatten()))
    return seen


def is_quantile(end, z, step=2 ** (1 / calibration.PER_OCTAVE)):
    """99 % of z lie below `end`, to within a step of the counting."""
    return (z <= end * step).float().mean() >= 0.99 > (z < end / step).float().mean()


@pytest.mark.parametrize("placement", ["output", "bottleneck", "weight"])
def test_the_grid_ends_at_the_quantile_of_the_last_calibration_step(placement):
    model = made(placement=placement, k_min=-1.0, k_max=2.0)
    seen = watched(model)
    train(model, batches(STEPS))
    assert len(seen) == STEPS
    end = splines(model)[0].grid_scale.item() * 2.0
    assert is_quantile(end, seen[-1]) and not is_quantile(end, seen[0])


def test_micro_batches_of_that_step_count_as_one():
    together, apart = (
        made(placement="bottleneck", calibration_steps=1),
        made(placement="bottleneck", calibration_steps=1),
    )
    rows = batches(3)
    seen = watched(apart)
    train(apart, rows[:1], forward=lambda x: sum(apart(x) for x, _ in rows) / 3)
    train(together, rows[:1], forward=lambda x: together(torch.cat([x for x, _ in rows])).mean(0, keepdim=True))
    assert len(seen) == 3
    assert is_quantile(splines(apart)[0].grid_scale.item() * 3.0, torch.cat(seen))
    assert splines(apart)[0].grid_scale == splines(together)[0].grid_scale


@pytest.mark.parametrize("scale", [1e-5, 1.0, 3e4])
def test_counting_finds_the_quantile_of_many_numbers(scale):
    model = made(placement="bottleneck", calibration_steps=1).train()
    spline = splines(model)[0]
    z = scale * torch.randn(50_000, generator=torch.Generator().manual_seed(3)).exp()
    calibration.observe(spline, z)
    [found] = calibration._quantiles([spline])
    assert found.item() == pytest.approx(z.quantile(0.99).item(), rel=0.005)


def test_calibration_waits_for_an_update_that_is_not_zero():
    model = made(placement="output", calibration_steps=1)
    seen = watched(model)
    train(model, batches(1))
    assert not seen[0].any()  # B = 0
    assert not splines(model)[0].is_calibrated
    train(model, batches(1))
    assert is_quantile(splines(model)[0].grid_scale.item() * 3.0, seen[1])


def test_the_spline_learns_afterwards_and_only_then():
    model = made(placement="bottleneck")
    before = []
    train(model, batches(), after_step=lambda: before.append(splines(model)[0].weight.abs().sum().item()))
    assert before[:STEPS] == [0.0] * STEPS
    assert all(moved > 0 for moved in before[STEPS:])
    scale = splines(model)[0].grid_scale.clone()
    train(model, batches())
    assert torch.equal(splines(model)[0].grid_scale, scale)


def adam(**settings):
    return lambda parameters: torch.optim.AdamW(parameters, lr=0.01, eps=1e-12, weight_decay=0.0, **settings)


def bnb_adam(parameters):
    return pytest.importorskip("bitsandbytes").optim.Adam32bit(parameters, lr=0.01, eps=1e-12)


def adafactor(parameters):
    return Adafactor(parameters, lr=0.01, scale_parameter=False, relative_step=False, clip_threshold=1e9)


OPTIMIZERS = {
    "adam": adam(foreach=False),
    "foreach": adam(foreach=True),
    "fused": adam(fused=True),
    "bitsandbytes": bnb_adam,
    "adafactor": adafactor,
}


@pytest.mark.parametrize("waited", [1, 50])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_steps_that_a_grid_waited_are_none_of_its_optimizers(optimizer, waited):
    """Adam's first step is the learning rate, whatever the gradient; counted from the start it would be a sixth of it
    or, later, a multiple."""
    model = made(placement="weight", calibration_steps=waited + 1)
    optimizer = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    for x, y in batches(1) * (waited + 2):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    for spline in splines(model):
        assert spline.is_calibrated
        for parameter in spline.parameters():
            first = 0.01 * parameter.grad.sign()
            learned = parameter.grad.abs() > 1e-9
            assert learned.any()
            torch.testing.assert_close(-parameter.detach()[learned], first[learned], rtol=1e-3, atol=0)


def test_optimizers_without_a_count_of_steps_are_left_as_they_are():
    model = made(placement="weight")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for x, y in batches():
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    assert all(spline.is_calibrated and spline.weight.any() for spline in splines(model))


def test_stretching_is_a_change_of_units():
    model = made(placement="output")
    spline = splines(model)[0]
    spline.calibrate(0.3)
    spline.values = torch.tensor([-2.0, -1.0, 0.5, 2.0, 3.5])
    plain = copy.deepcopy(spline)
    plain.grid_scale = None
    z = torch.randn(100)
    torch.testing.assert_close(spline(z), 0.1 * plain(z / 0.1))


def test_the_penalty_is_on_heights_in_the_unit_of_z():
    model = made(spline_reg_weight=0.5)
    for spline in splines(model):
        spline.calibrate(0.3)  # σ = 0.1
        spline.values = spline.grid + torch.tensor([1.0, 0.0, -2.0, 0.0, 0.5])
        spline.weight.grad = torch.zeros(5)
    penalty = spline_penalty(model)
    assert penalty.item() == pytest.approx(2 * 0.5 * 0.01 * (1 + 4 + 0.25) / 5)
    expected = torch.autograd.grad(penalty, [spline.weight for spline in splines(model)])
    torch.optim.SGD([spline.weight for spline in splines(model)], lr=0.0).step()
    for spline, gradient in zip(splines(model), expected, strict=True):
        torch.testing.assert_close(spline.weight.grad, gradient)


def test_occupancy_is_counted_on_the_stretched_grid():
    model = made(placement="bottleneck")
    train(model, batches())
    seen = []
    for spline in splines(model):
        spline.register_forward_pre_hook(lambda spline, args: seen.append(args[0].detach() / spline.grid_scale))
    with observe_occupancy(model) as occupancy:
        model(torch.randn(1000, 8))
    for record, t in zip(spline_records(model, occupancy=occupancy), seen, strict=True):
        expected = [((t >= low) & (t < low + 1.5)).float().mean().item() for low in (-3.0, -1.5, 0.0, 1.5)]
        assert record["occupancy"][1:-1] == pytest.approx(expected, abs=1e-6)
        assert live_intervals(record) == 1.0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_makes_no_difference(use_reentrant):
    plain, repeated = made(placement="bottleneck"), made(placement="bottleneck")

    def forward(x):
        return checkpoint(repeated, x.requires_grad_(), use_reentrant=use_reentrant)

    rows = batches()
    losses = train(plain, rows)
    assert train(repeated, [(x.clone(), y) for x, y in rows], forward=forward) == pytest.approx(losses, rel=1e-5)


def test_a_saved_grid_is_loaded_and_not_measured_again(tmp_path):
    model = made(placement="bottleneck")
    train(model, batches())
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    again = PeftModel.from_pretrained(net, tmp_path, is_trainable=True)
    x = torch.randn(5, 8)
    torch.testing.assert_close(again(x), model(x))
    scales = [spline.grid_scale.clone() for spline in splines(again)]
    train(again, batches())
    assert all(torch.equal(s.grid_scale, scale) for s, scale in zip(splines(again), scales, strict=True))


@pytest.mark.parametrize("strict", [False, True])
def test_a_saved_grid_is_known_when_a_model_is_exported(tmp_path, strict):
    """Right after loading: a graph cannot ask the device whether the grid has been measured."""
    model = made()
    train(model, batches())
    model.eval().save_pretrained(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    again, x = PeftModel.from_pretrained(net, tmp_path).eval(), torch.randn(5, 8)
    exported = torch.export.export(again, (x,), strict=strict).module()
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # of plain LoRA's A and B as well
def test_a_saved_grid_reaches_a_layer_that_is_offloaded_to_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # peft writes the base's offloaded weights below the folder it is started in
    torch.manual_seed(0)
    tiny = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    LlamaForCausalLM(tiny).save_pretrained(tmp_path / "base")
    config = LSLoraConfig.recommended(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    for spline in splines(model):
        spline.calibrate(1.3)
        nn.init.normal_(spline.weight, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    kept = ("embed_tokens", "layers.1", "norm", "rotary_emb")
    places = {"model.layers.0": "disk", "lm_head": "cpu"} | {f"model.{name}": "cpu" for name in kept}
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map=places, offload_folder=tmp_path / "a")
    adapter_places = {f"base_model.model.{name}": place for name, place in places.items()}
    offloaded = PeftModel.from_pretrained(
        base, tmp_path / "adapter", device_map=adapter_places, offload_folder=str(tmp_path / "b")
    )
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(offloaded.eval()(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("moved", ["saved", "copied", "pickled"])
def test_an_interrupted_calibration_goes_on_counting(tmp_path, moved):
    model, rows = made(placement="bottleneck"), batches()
    train(model, rows[: STEPS - 1])
    if moved == "saved":
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
        other = PeftModel.from_pretrained(net, tmp_path, is_trainable=True)
    elif moved == "copied":
        other = copy.deepcopy(model)
    else:
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert [spline.steps_waited for spline in splines(other)] == [STEPS - 1] * 2
    x = rows[0][0]
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    train(other, rows[STEPS - 1 : STEPS])
    assert all(spline.is_calibrated and spline.steps_waited == 0 for spline in splines(other))
    assert not any(spline.is_calibrated for spline in splines(model))


def test_a_state_from_before_the_calibration_waits_again():
    model = made(placement="bottleneck")
    early = copy.deepcopy(model.state_dict())
    train(model, batches())
    model.load_state_dict(early)
    assert not any(spline.is_calibrated for spline in splines(model))
    train(model, batches())
    assert all(spline.is_calibrated for spline in splines(model))


def test_a_step_that_was_not_finite_only_delays():
    model = made(placement="bottleneck", calibration_steps=1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train(model, [(torch.full((4, 8), float("nan")), torch.zeros(4, 3))])
    assert not any(spline.is_calibrated for spline in splines(model))
    for parameter, value in zip(model.parameters(), before, strict=True):
        parameter.data.copy_(value)
    train(model, batches(1))
    assert all(spline.is_calibrated for spline in splines(model))


def test_a_frozen_adapter_is_not_observed():
    model = made(placement="bottleneck").train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model(torch.randn(4, 8))
    assert all(calibration._waiting[spline].counts is None for spline in splines(model))


def test_copies_and_pickles_keep_waiting():
    model = made(placement="bottleneck")
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        train(other, batches())
        assert all(spline.is_calibrated for spline in splines(other))
    assert not any(spline.is_calibrated for spline in splines(model))


def test_evaluation_measures_nothing():
    model = made(placement="bottleneck").eval()
    model(torch.full((4, 8), 100.0))
    model.train()
    train(model, batches())
    assert all(spline.grid_scale.item() < 10 for spline in splines(model))


@pytest.mark.parametrize("placement", ["output", "bottleneck", "weight"])
def test_a_forward_pass_in_inference_mode_does_not_disturb_the_measuring_step(placement):
    """As a metric or a teacher has it."""
    model = made(placement=placement)

    def forward(x):
        with torch.inference_mode():
            model(x)
        return model(x)

    train(model, batches(), forward=forward)
    assert all(spline.is_calibrated and spline.weight.any() for spline in splines(model))


@pytest.mark.parametrize("shape", [(16384, 16), (4, 4096, 64), (3, 5, 70000)])
def test_every_feature_is_counted_however_many_tokens_there_are(shape):
    spline = Spline(LSLoraConfig(calibration_steps=1))
    z = torch.ones(shape)
    z[..., ::4] = 0.01
    spline.weight.requires_grad_()
    calibration.observe(spline, z)
    counts = calibration._waiting[spline].counts
    assert (counts > 0).sum() == 2
    assert counts[counts > 0].float()[0] / counts.sum() == pytest.approx(0.25, abs=0.01)


def test_an_adapter_that_is_not_active_does_not_wait():
    model = made()
    model.add_adapter("other", model.peft_config["default"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(x, y):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for x, y in batches(STEPS - 1):
        step(x, y)
    ours, other = ([s for name, s in model.named_modules() if name.endswith(f"lora_spline.{a}")] for a in
                   ("default", "other"))  # fmt: skip
    assert [s.steps_waited for s in ours + other] == [STEPS - 1] * 2 + [0] * 2
    model.set_adapter("other")
    for x, y in batches(STEPS):
        step(x, y)
    assert not any(s.is_calibrated for s in ours) and all(s.is_calibrated for s in other)


def test_waiting_splines_without_tensors_disturb_no_other_optimizer():
    empty = made().to("meta")
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    torch.optim.SGD(empty.parameters(), lr=0.1).step()
    assert not any(spline.is_calibrated for spline in splines(empty))


def test_a_step_that_a_fused_optimizer_passes_over_does_not_count():
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for x, y in batches(2):
        scaler.scale((model(x) - y).square().mean()).backward()
        splines(model)[0].weight.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert [spline.steps_waited for spline in splines(model)] == [0, 0]


@pytest.mark.parametrize("placement", ["output", "bottleneck", "weight"])
@pytest.mark.parametrize("other", [{}, {"target_modules": ["0"]}])
def test_a_hot_swap_from_a_grid_that_is_known_to_one_that_is_not(placement, other, tmp_path):
    model = made(placement=placement)
    train(model, batches())
    settings = {"placement": placement, "calibration_steps": STEPS, "extrapolation": "linear"} | other
    torch.manual_seed(3)
    net = copy.deepcopy(model.get_base_model())
    base = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    base.load_state_dict({k.replace("base_layer.", ""): v for k, v in net.state_dict().items() if "lora" not in k})
    config = LSLoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **{"target_modules": ["0", "2"]} | settings)
    swapped_in = get_peft_model(base, config)
    swapped_in.save_pretrained(tmp_path)
    hotswap_adapter(model, str(tmp_path), adapter_name="default")
    x = batches(1)[0][0]
    torch.testing.assert_close(model.eval()(x), swapped_in.eval()(x))


def test_copies_of_data_parallel_cannot_measure_a_grid():
    spline = splines(made())[0]
    copied = spline._replicate_for_data_parallel()
    for name, parameter in spline.named_parameters():  # as torch's `replicate` goes on, on another GPU
        setattr(copied, name, parameter.detach().clone())
    with pytest.raises(ValueError, match="DataParallel .* one process for each GPU"):
        copied(torch.ones(2, 3))


def test_a_copy_of_parameters_alone_is_told_what_to_do():
    spline = splines(made())[0]
    with torch.no_grad():
        spline.weight += 1
    with pytest.raises(ValueError, match="must copy its state dict.*SplineTrainerMixin"):
        spline(torch.ones(2, 3))


def test_wrong_calibrations_raise():
    with pytest.raises(ValueError, match="calibration_steps > 0"):
        splines(made(calibration_steps=0))[0].calibrate(1.0)
    for end in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be a positive number"):
            splines(made())[0].calibrate(end)


class Answers(TorchDispatchMode):
    """Counts how often Python asks a tensor for a number: a GPU is waited for then."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.bincount.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("placement", ["output", "bottleneck", "weight"])
def test_a_grid_that_waits_in_training_asks_no_device(placement):
    model = made(placement=placement)
    x, y = batches(1)[0]
    with Answers() as first:
        model(x)
    assert first.count  # the check can fail
    train(model, batches(1))
    with Answers() as later:
        (model(x) - y).square().mean().backward()
        calibration.count_step(splines(model))
    assert not later.count
    assert [spline.steps_waited for spline in splines(model)] == [2, 2]


def test_only_the_last_step_of_a_calibration_is_looked_at(monkeypatch):
    """In those before it a layer is one operation, as it is after it."""
    looked, module = [], importlib.import_module("lslora.spline")
    real = {"observe": calibration.observe, "adapted_linear": module.adapted_linear}
    monkeypatch.setattr(calibration, "observe", lambda *args: looked.append("observed") or real["observe"](*args))
    monkeypatch.setattr(
        module,
        "adapted_linear",
        lambda *args, **named: looked.append("quick") or real["adapted_linear"](*args, **named),
    )
    train(made(), batches(STEPS + 1))
    assert looked == ["quick"] * 2 * (STEPS - 1) + ["observed"] * 2 + ["quick"] * 2


@pytest.mark.parametrize("learn_scales", [True, False])
@pytest.mark.parametrize("large", [False, True])
def test_a_layer_that_waits_computes_plain_lora_and_every_parameter_takes_part(learn_scales, large):
    found, rows = [], batches(3)
    for model in (made(LoraConfig), made(learn_scales=learn_scales)):
        train(model, rows[:2])
        if large:  # far beyond any grid
            model.base_model.model[2].lora_B["default"].weight.data.mul_(1e4)
        y = model(rows[2][0])
        y.square().mean().backward()
        found.append({"y": y.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, ours = found
    for name, value in plain.items():
        torch.testing.assert_close(ours.pop(name), value, rtol=1e-5, atol=1e-6 * value.abs().max().item())
    assert len(ours) == (6 if learn_scales else 2)
    assert not any(gradient.any() for gradient in ours.values())


def test_what_is_written_to_a_waiting_grid_in_training_is_noticed():
    model = made()
    train(model, batches(1))
    for spline in splines(model):
        assert spline.waits
        with torch.no_grad():
            spline.grid_scale.fill_(0.5)
        assert not spline.waits and spline.is_calibrated


def test_a_grid_put_in_a_waiting_ones_place_in_training_is_noticed():
    model = made()
    train(model, batches(1))
    for spline in splines(model):
        assert spline.waits
        other = torch.empty(1)
        while other._version < spline.grid_scale._version:  # as often written to
            other.fill_(0.5)
        spline.grid_scale = other
        assert not spline.waits and spline.is_calibrated


def test_learned_heights_under_a_waiting_grid_are_noticed_whenever_it_may_have_changed():
    model = made()
    train(model, batches(1))
    with torch.no_grad():
        splines(model)[0].weight.fill_(1.0)
    with pytest.raises(ValueError, match="must have its grid_scale"):
        model.eval()(torch.randn(2, 8))
    with pytest.raises(ValueError, match="must have its grid_scale"):
        copy.deepcopy(model).train()(torch.randn(2, 8))
