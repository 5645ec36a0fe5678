"""A first check of an installation: runs as a script (prints what it checked) and under pytest.

For both interpolation methods: the identity start, the gradients of every parameter against finite differences in
float64, and save and load.
"""

from __future__ import annotations

import copy
import sys
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lslora import LSLoraConfig, Spline

METHODS = ("piecewise", "soft")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5, bias=False))


def adapted(config_class: type[LoraConfig], **settings: object) -> PeftModel:
    base = net()
    config = config_class(r=2, lora_alpha=4, target_modules=["0", "2"], init_lora_weights=False, **settings)
    torch.manual_seed(1)
    return get_peft_model(base, config)


def bend(model: PeftModel) -> None:
    """Give every spline a shape that is no identity."""
    torch.manual_seed(2)
    for spline in (module for module in model.modules() if isinstance(module, Spline)):
        spline.values = spline.grid + 0.2 * torch.randn(len(spline.grid))
        spline.input_scale, spline.output_scale = 0.9, 1.2


def test_identity_start() -> None:
    """A fresh adapter computes what plain LoRA computes."""
    x = torch.randn(10, 6)
    expected = adapted(LoraConfig)(x)
    for method in METHODS:
        actual = adapted(LSLoraConfig, interpolation_method=method)(x)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_gradients_of_every_parameter() -> None:
    """Central differences of the loss in every entry of every trainable parameter, in float64."""
    for method in METHODS:
        model = adapted(LSLoraConfig, interpolation_method=method)
        bend(model)
        for module in model.modules():  # past the spline's own guard of its precision
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.double(), parameter.requires_grad)
        x = torch.randn(4, 6, dtype=torch.float64)

        def loss(model: PeftModel = model, x: torch.Tensor = x) -> torch.Tensor:
            return model(x).square().sum()

        loss().backward()
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert sum("lora_spline" in name for name in trainable) == 6
        for name, parameter in trainable.items():
            torch.testing.assert_close(
                parameter.grad,
                finite_differences(loss, parameter),
                rtol=1e-5,
                atol=1e-6,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@torch.no_grad()
def finite_differences(loss, parameter: nn.Parameter, step: float = 1e-6) -> torch.Tensor:  # type: ignore[no-untyped-def]
    gradient = torch.zeros_like(parameter)
    for i in range(parameter.numel()):
        entry = parameter.view(-1)[i : i + 1]
        kept = entry.clone()
        above, below = (loss() if entry.copy_(kept + sign * step) is not None else None for sign in (1, -1))
        entry.copy_(kept)
        gradient.view(-1)[i] = (above - below) / (2 * step)
    return gradient


def test_save_and_load() -> None:
    """A loaded adapter gives equal outputs, bit for bit."""
    x = torch.randn(10, 6)
    for method in METHODS:
        model = adapted(LSLoraConfig, interpolation_method=method).eval()
        bend(model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = PeftModel.from_pretrained(copy.deepcopy(net()), folder).eval()
        assert torch.equal(again(x), model(x))


if __name__ == "__main__":
    for check in (test_identity_start, test_gradients_of_every_parameter, test_save_and_load):
        check()
        print(f"ok: {check.__doc__.splitlines()[0]} ({' and '.join(METHODS)})")
    sys.exit(0)
