"""The penalty, the optimizer group and the log under real trainers, on a small real architecture."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.optimization import Adafactor
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from trl import SFTConfig, SFTTrainer

from lslora import LSLoraConfig, Spline, spline_penalty
from lslora.training import SplineTrainerMixin, separate_spline_group

WORDS = ["the", "correct", "answer", "is", "true", "false", "red", "green", "blue", "one", "two", "three"]
VOCABULARY = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}


def tokenizer():
    raw = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def model(offset=0.0, **settings):
    """A small Llama with a spline at every linear layer, `offset` off the identity, and B not zero."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    peft_model = get_peft_model(
        base,
        LSLoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **settings),
    )
    for spline in splines(peft_model):
        spline.values = spline.grid + offset * torch.linspace(-1, 2, len(spline.grid))
    return peft_model


def splines(peft_model):
    return [module for module in peft_model.modules() if isinstance(module, Spline)]


def rows(count=16):
    texts = [f"{WORDS[i % 5]} {WORDS[(3 * i) % 7]}" for i in range(count)]
    return Dataset.from_list(
        [{"prompt": text, "completion": f" the answer is {WORDS[i % 12]}"} for i, text in enumerate(texts)]
    )


def tokenized(count=16):
    encode = tokenizer()
    ids = [encode(f"{row['prompt']}{row['completion']}")["input_ids"] for row in rows(count)]
    return Dataset.from_list([{"input_ids": i, "attention_mask": [1] * len(i), "labels": i} for i in ids])


def settings(tmp_path, accumulation=1, **more):
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "optim": "sgd",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    return defaults | more


def sft(tmp_path, peft_model, accumulation=1, trainer=SFTTrainer, eval_dataset=None, trainer_settings=None, **more):
    return trainer(
        model=peft_model, args=SFTConfig(**settings(tmp_path, accumulation, **more)), train_dataset=rows(),
        eval_dataset=eval_dataset, processing_class=tokenizer(), **(trainer_settings or {}),
    )  # fmt: skip


def plain(tmp_path, peft_model, accumulation=1, **more):
    args = TrainingArguments(**settings(tmp_path, accumulation, remove_unused_columns=False, **more))

    def collate(batch):
        width = max(len(row["input_ids"]) for row in batch)
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {
            key: torch.tensor([row[key] + [pad] * (width - len(row[key])) for row in batch])
            for key, pad in fill.items()
        }

    return Trainer(model=peft_model, args=args, train_dataset=tokenized(), data_collator=collate)


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
@pytest.mark.parametrize("make_trainer", [sft, plain])
def test_penalty_moves_the_knots_by_the_analytic_amount(tmp_path, make_trainer, accumulation):
    """One SGD step with weight 1000 and one with 0 differ by `lr · 2 · 1000 / K · (v − k)`."""
    moved = {}
    for weight in (0.0, 1000.0):
        peft_model = model(offset=0.1, spline_reg_weight=weight)
        offsets = splines(peft_model)[0].weight.detach().clone()
        make_trainer(tmp_path, peft_model, accumulation).train()
        moved[weight] = [spline.weight.detach().clone() for spline in splines(peft_model)]
    expected = -1e-3 * 2 * 1000.0 / 5 * offsets
    assert len(moved[0.0]) == 14
    for without, with_penalty in zip(moved[0.0], moved[1000.0], strict=True):
        torch.testing.assert_close(with_penalty - without, expected, rtol=1e-4, atol=1e-7)


def test_penalty_gradient_is_that_of_its_value():
    peft_model = model(offset=0.3, spline_reg_weight=0.7, num_knots=6)
    weights = [spline.weight for spline in splines(peft_model)]
    expected = torch.autograd.grad(spline_penalty(peft_model), weights)
    assert spline_penalty(peft_model).item() == pytest.approx(14 * 0.7 * (weights[0] ** 2).mean().item())
    start = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    torch.optim.SGD(weights, lr=1.0).step()
    for weight, before, gradient in zip(weights, start, expected, strict=True):
        torch.testing.assert_close(before - weight, gradient)


def test_penalties_on_several_devices_are_summed_on_the_first():
    apart = torch.nn.ModuleList([Spline(LSLoraConfig()).to("meta"), Spline(LSLoraConfig())])
    assert spline_penalty(apart).device.type == "meta"


def test_penalties_of_splines_that_differ_are_each_their_own():
    models = [
        model(offset=0.3, spline_reg_weight=0.7, num_knots=6),
        model(offset=0.2, spline_reg_weight=0.4, num_knots=6),
        model(offset=0.1, spline_reg_weight=0.7, num_knots=4),
        model(offset=0.1, spline_reg_weight=0.7, num_knots=6, calibration_steps=2),
    ]
    for i, spline in enumerate(splines(models[-1])):
        spline.calibrate(1.0 + i)
    weights = [spline.weight for peft_model in models for spline in splines(peft_model)]
    with torch.no_grad():
        for i, weight in enumerate(weights):
            weight.mul_(1 + i)
    expected = torch.autograd.grad(sum(spline_penalty(peft_model) for peft_model in models), weights)
    start = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    torch.optim.SGD(weights, lr=1.0).step()
    assert len({round(gradient.norm().item(), 4) for gradient in expected}) > 50
    for weight, before, gradient in zip(weights, start, expected, strict=True):
        torch.testing.assert_close(before - weight, gradient)


def test_parts_of_splines_have_the_penalty_of_their_knots():
    """As FSDP 1 leaves them to a process whose share of the parameters ends within a spline."""
    whole, parted = (model(offset=0.3, spline_reg_weight=0.7) for _ in range(2))
    for peft_model in (whole, parted):
        for spline in splines(peft_model):
            spline.values = [-3.5, -1.0, 0.2, 1.5, 3.1]
    first = splines(parted)[0]
    first.weight = torch.nn.Parameter(first.weight.detach()[:2].clone())
    for spline in (*splines(whole), *splines(parted)):
        spline.weight.grad = torch.zeros_like(spline.weight)
    torch.optim.SGD([spline.weight for peft_model in (whole, parted) for spline in splines(peft_model)], lr=1.0).step()
    torch.testing.assert_close(first.weight, splines(whole)[0].weight[:2])
    for one, other in zip(splines(whole)[1:], splines(parted)[1:], strict=True):
        torch.testing.assert_close(other.weight, one.weight)
    assert (first.weight - torch.tensor([-0.5, 0.5])).abs().min() > 0.01


def test_penalty_reaches_copies_and_only_what_is_stepped():
    first = model(offset=0.2, spline_reg_weight=1.0)
    second = copy.deepcopy(first)
    third = torch.nn.Linear(2, 2)
    for peft_model in (first, second):
        for spline in splines(peft_model):
            spline.weight.grad = torch.zeros_like(spline.weight)
    unused, frozen = splines(second)[0], splines(second)[2]
    unused.weight.grad = None
    frozen.weight.requires_grad_(False)  # with the gradient of zeros that zero_grad(set_to_none=False) leaves
    before = splines(first)[0].weight.detach().clone()
    optimizer = torch.optim.SGD([*second.parameters(), *third.parameters()], lr=1.0)
    optimizer.step()
    assert torch.equal(splines(first)[0].weight, before)
    assert torch.equal(unused.weight, before) and torch.equal(frozen.weight, before)
    torch.testing.assert_close(splines(second)[1].weight, before * (1 - 2 / 5))


def test_an_optimizer_that_maximises_pulls_the_knots_to_the_identity_too():
    peft_model = model(offset=0.2, spline_reg_weight=1.0)
    weights = [spline.weight for spline in splines(peft_model)]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    before = [weight.detach().clone() for weight in weights]
    groups = [{"params": weights[:3], "maximize": True}, {"params": weights[3:]}]
    torch.optim.SGD(groups, lr=1.0).step()
    for weight, start in zip(weights, before, strict=True):
        torch.testing.assert_close(weight, start * (1 - 2 / 5))


def test_penalty_does_not_colour_the_losses(tmp_path):
    losses = []
    for weight in (0.0, 1000.0):
        trainer = sft(
            tmp_path, model(offset=0.1, spline_reg_weight=weight), eval_dataset=rows(4), logging_steps=1,
            eval_strategy="steps", eval_steps=1, learning_rate=0.0,
        )  # fmt: skip
        trainer.train()
        losses.append([entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history[:2]])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("as_keyword", [True, False])
def test_a_step_with_a_closure_takes_the_penalty_too(as_keyword):
    moved = []
    for closing in (False, True):
        peft_model = model(offset=0.1, spline_reg_weight=0.7)
        optimizer = torch.optim.SGD(peft_model.parameters(), lr=1.0)
        x = torch.arange(6).view(1, 6)

        def closure(peft_model=peft_model, optimizer=optimizer, x=x):
            optimizer.zero_grad()
            loss = peft_model(x, labels=x).loss
            loss.backward()
            return loss

        if not closing:
            closure()
            optimizer.step()
        else:
            optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
        moved.append([s.weight.detach() for s in splines(peft_model)])
    for plain, closed in zip(*moved, strict=True):
        assert torch.equal(plain, closed)


def test_lbfgs_minimises_the_penalty():
    peft_model = model(offset=0.1, spline_reg_weight=0.7)
    weights = [s.weight for s in splines(peft_model)]
    optimizer = torch.optim.LBFGS(weights, lr=1.0)

    def closure():
        optimizer.zero_grad()
        loss = sum(0.0 * weight.sum() for weight in weights)
        loss.backward()
        return loss + spline_penalty(peft_model).detach()

    before = spline_penalty(peft_model).item()
    for _ in range(5):
        optimizer.step(closure)
    assert spline_penalty(peft_model).item() < 1e-4 * before


@pytest.mark.parametrize("fused", [False, True])
def test_loss_scaling_leaves_the_penalty_as_it_is(fused):
    moved = []
    for scale in (1.0, 65536.0):
        peft_model = model(offset=0.1, spline_reg_weight=50.0)
        optimizer = torch.optim.SGD(peft_model.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        x = torch.arange(6).view(1, 6)
        scaler.scale(peft_model(x, labels=x).loss).backward()
        scaler.step(optimizer)
        moved.append([s.weight.detach() for s in splines(peft_model)])
    for plain, scaled in zip(*moved, strict=True):
        torch.testing.assert_close(scaled, plain)


def test_spline_group():
    peft_model = model()
    trainable = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0.1)
    separate_spline_group(optimizer, peft_model, lr=0.025)
    others, own = optimizer.param_groups
    assert {id(p) for p in own["params"]} == {id(p) for s in splines(peft_model) for p in s.parameters()}
    assert (own["lr"], own["weight_decay"], others["lr"], others["weight_decay"]) == (0.025, 0.0, 1e-3, 0.1)
    assert len(own["params"]) + len(others["params"]) == len(trainable)
    with pytest.raises(ValueError, match="lr must be positive, got 0"):
        separate_spline_group(optimizer, peft_model, lr=0)
    with pytest.raises(ValueError, match="must come from groups of one lr"):
        mixed = [{"params": [p], "lr": 10.0**-i} for i, p in enumerate(splines(peft_model)[0].parameters())]
        separate_spline_group(torch.optim.SGD(mixed), peft_model)
    with pytest.raises(ValueError, match="one betas"):
        mixed = [
            {"params": [p], "betas": (0.9, 0.9 + i / 100)} for i, p in enumerate(splines(peft_model)[0].parameters())
        ]
        separate_spline_group(torch.optim.AdamW(mixed), peft_model)
    plain_model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(plain_model.parameters(), lr=1.0)
    separate_spline_group(optimizer, plain_model)
    assert len(optimizer.param_groups) == 1


def test_the_spline_group_inherits_what_its_source_was_set_to():
    peft_model = model()
    trainable = [(name, p) for name, p in peft_model.named_parameters() if p.requires_grad]
    own = {"betas": (0.5, 0.6), "eps": 1e-3}
    optimizer = torch.optim.AdamW([{"params": trainable, **own}], lr=1e-3)
    separate_spline_group(optimizer, peft_model, lr=2e-3)
    first, second = optimizer.param_groups
    assert (second["betas"], second["eps"], second["lr"]) == (*own.values(), 2e-3)
    by_id = {id(p): name for name, p in trainable}
    for group in (first, second):
        assert group["param_names"] == [by_id[id(p)] for p in group["params"]]
    assert len(first["params"]) + len(second["params"]) == len(trainable)
    assert all("lora_spline" in name for name in second["param_names"])


def test_an_optimizer_without_a_rate_is_refused_and_stays_as_it_is():
    peft_model = model()
    optimizer = Adafactor([p for p in peft_model.parameters() if p.requires_grad], lr=None, relative_step=True)
    before = list(optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match="must have a learning rate"):
        separate_spline_group(optimizer, peft_model)
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(before)]


class SplineSFTTrainer(SplineTrainerMixin, SFTTrainer):
    pass


def test_trainer_gives_the_splines_their_learning_rate_and_logs_them(tmp_path):
    start = model(offset=0.0)
    before = {name: p.detach().clone() for name, p in start.named_parameters()}
    steps = {}
    for rate in (None, 1e-2):
        peft_model = model()
        trainer = sft(
            tmp_path, peft_model, trainer=SplineSFTTrainer, trainer_settings={"spline_lr": rate},
            logging_steps=1, max_grad_norm=0.0, lr_scheduler_type="linear", max_steps=1,
        )  # fmt: skip
        trainer.train()
        steps[rate] = {n: p.detach() - before[n] for n, p in peft_model.named_parameters() if p.requires_grad}
        entry = next(e for e in trainer.state.log_history if "loss" in e)
        deviation = sum(s.weight.detach().abs().mean().item() for s in splines(peft_model)) / 14
        assert entry["spline/deviation"] == pytest.approx(deviation, rel=1e-5) and deviation > 0
        assert {"spline/slope_variance", "spline/input_scale", "spline/output_scale"} <= entry.keys()
    for name, step in steps[None].items():
        ratio = 10.0 if "lora_spline" in name else 1.0
        # Steps are differences of fp32 numbers near 1 for A and B, hence the absolute part.
        torch.testing.assert_close(steps[1e-2][name], ratio * step, rtol=1e-3, atol=2e-7, msg=name)


def test_trainer_refuses_a_rate_that_is_not_positive(tmp_path):
    with pytest.raises(ValueError, match="spline_lr must be positive, got -1"):
        sft(tmp_path, model(), trainer=SplineSFTTrainer, trainer_settings={"spline_lr": -1})


def test_resuming_gives_the_weights_of_an_uninterrupted_run(tmp_path):
    more = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "lr_scheduler_type": "linear"}
    more |= {"trainer": SplineSFTTrainer, "trainer_settings": {"spline_lr": 2e-2}, "max_steps": 4}
    whole, resumed = model(), model()
    sft(tmp_path / "whole", whole, **more).train()
    sft(tmp_path / "resumed", resumed, **more).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert any((s.weight != 0).any() for s in splines(whole))
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_optimizer_asked_for_twice_keeps_its_rates(tmp_path):
    rate = {"spline_lr": 3e-2}
    trainer = sft(tmp_path, model(), trainer=SplineSFTTrainer, trainer_settings=rate, learning_rate=1e-2)
    optimizer = trainer.create_optimizer()
    assert trainer.create_optimizer() is optimizer
    assert sorted(group["lr"] for group in optimizer.param_groups if group["params"]) == pytest.approx([1e-2, 3e-2])


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_training_twice_keeps_the_rates(tmp_path, schedule):
    more = {"trainer": SplineSFTTrainer, "trainer_settings": {"spline_lr": 1e-2}, "learning_rate": 1e-3}
    trainer = sft(tmp_path, model(), lr_scheduler_type=schedule, max_steps=2, **more)
    rates = []
    for _ in range(2):
        trainer.train()
        rates.append([group["initial_lr"] for group in trainer.optimizer.param_groups if group["params"]])
    assert sorted(rates[0]) == sorted(rates[1]) == pytest.approx([1e-3, 1e-2])


def test_an_optimizer_with_its_scheduler_must_know_the_splines(tmp_path):
    def trained(separated):
        peft_model = model()
        optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-3)
        if separated:
            separate_spline_group(optimizer, peft_model, lr=4e-3)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        trainer = sft(
            tmp_path, peft_model, trainer=SplineSFTTrainer, trainer_settings={"optimizers": (optimizer, scheduler)}
        )
        trainer.train()
        return [group["lr"] for group in optimizer.param_groups]

    assert trained(separated=True) == pytest.approx([1e-3, 4e-3])
    with pytest.raises(ValueError, match="separate_spline_group before the scheduler is made"):
        trained(separated=False)


class StepsInBackward(torch.optim.Optimizer):
    """As LOMO, which has no step that anything could be added to."""

    def __init__(self, parameters=()):
        super().__init__(parameters or [torch.zeros(1)], {"lr": 1e-3})


@pytest.mark.parametrize("optimizer", [LayerWiseDummyOptimizer, StepsInBackward])
def test_an_optimizer_that_steps_in_the_backward_pass_is_refused(tmp_path, optimizer):
    settings = {"optimizers": (optimizer(), None)}
    trainer = sft(tmp_path, model(), trainer=SplineSFTTrainer, trainer_settings=settings)
    with pytest.raises(ValueError, match="takes its steps within the backward pass"):
        trainer.create_optimizer()
