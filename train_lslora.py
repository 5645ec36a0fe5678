"""Fine-tune a causal language model with LS-LoRA, or with plain LoRA for comparison.

TRL's SFTTrainer does the work. The defaults are the recipe of the reference run (README, "Method"); what is read and
written is described in the README, "Training".
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from contextlib import ExitStack, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lslora.base_model import BaseModel
    from lslora.data import Example, Row

# Those whose package has their name.
TRACKERS = ("wandb", "tensorboard", "trackio", "mlflow", "comet_ml", "clearml", "codecarbon", "dvclive", "swanlab")
TRACKERS += ("neptune", "dagshub")
OCCUPANCY_BATCHES = 8
SPLINE_PICTURES = ("spline_curves", "spline_deviations")
# What may differ between a run and its going on with --resume: how long it is, how a step is spread over processes,
# and what it tells of itself.
MAY_CHANGE = ("max_steps", "batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
MAY_CHANGE += ("save_steps", "logging_steps", "report_to", "eval_dataset_path")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    group = parser.add_argument_group("what to train")
    group.add_argument("--model_name", required=True, help="smollm2 (the embedded model), a hub id or a local folder")
    group.add_argument(
        "--dataset_path", required=True, help="JSON or JSONL: instruction and output, messages, or text"
    )
    group.add_argument("--output_dir", required=True, help="folder for checkpoints, the adapter and its diagnostics")
    group.add_argument("--method", choices=("lslora", "lora"), default="lslora", help="lora is peft's plain LoRA")
    group.add_argument("--eval_dataset_path", help="rows to answer before and after training, for the accuracy")
    group.add_argument("--chat_template", action="store_true", help="write instructions as the tokenizer's chat does")
    group.add_argument("--loss_on_prompt", action="store_true", help="train on the prompt's tokens as well")

    group = parser.add_argument_group("training")
    group.add_argument("--max_steps", type=positive, default=500)
    group.add_argument("--batch_size", type=positive, default=4, help="rows a device and micro-batch")
    group.add_argument("--gradient_accumulation_steps", type=positive, default=1)
    group.add_argument("--learning_rate", type=float, default=2e-4)
    group.add_argument("--spline_lr", type=float, help="learning rate of the splines; by default LoRA's")
    group.add_argument("--lr_scheduler_type", default="linear")
    group.add_argument("--warmup_steps", type=float, default=0, help="steps, or a share of all steps if below 1")
    group.add_argument("--weight_decay", type=float, default=0.0, help="of A and B; the splines have none")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="of all trained parameters; 0 clips nothing")
    group.add_argument(
        "--optim", default="adamw_torch_fused", help="any optimizer of transformers, e.g. paged_adamw_32bit"
    )
    group.add_argument("--max_length", type=positive, default=512, help="tokens a row; longer rows are cut at the end")
    group.add_argument("--group_by_length", action="store_true", help="rows of similar length share a batch")
    group.add_argument("--seed", type=int, default=42)

    group = parser.add_argument_group("adapter")
    group.add_argument("--r", type=positive, default=16, help="rank")
    group.add_argument("--lora_alpha", type=int, default=32)
    group.add_argument("--lora_dropout", type=float, default=0.05)
    group.add_argument("--use_rslora", action="store_true", help="divide lora_alpha by the root of r instead of r")
    group.add_argument("--target_modules", nargs="+", default=["all-linear"])

    group = parser.add_argument_group("spline (--method lslora)")
    group.add_argument("--recommended", action="store_true", help="defaults that measured best: README, 'Results'")
    group.add_argument("--placement", choices=("output", "bottleneck", "weight"), default="output")
    group.add_argument("--num_knots", type=int, default=5)
    group.add_argument("--k_min", type=float, default=-3.0)
    group.add_argument("--k_max", type=float, default=3.0)
    group.add_argument("--interpolation_method", choices=("piecewise", "soft"), default="piecewise")
    group.add_argument("--extrapolation", choices=("clamp", "linear"), default="clamp")
    group.add_argument("--learn_scales", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--calibration_steps", type=int, default=0, help="steps that measure each grid; 0: fixed grid")
    group.add_argument("--spline_reg_weight", type=float, default=0.01)

    group = parser.add_argument_group("memory and machine")
    group.add_argument("--load_in_4bit", action="store_true", help="quantise the base (QLoRA); needs bitsandbytes")
    group.add_argument("--bf16", action="store_true", help="bfloat16 base and autocast instead of float32")
    group.add_argument("--gradient_checkpointing", action="store_true")

    group = parser.add_argument_group("log and checkpoints")
    group.add_argument("--save_steps", type=positive, default=100)
    group.add_argument("--logging_steps", type=positive, default=10)
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    group.add_argument("--report_to", nargs="+", default=["none"], help="wandb, tensorboard, trackio, ...")
    group.add_argument("--quiet", action="store_true", help="no progress bars, no log and no tables, only errors")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    known = parser()
    args = known.parse_args(argv)
    if not args.learning_rate > 0:
        known.error(f"--learning_rate must be positive, got {args.learning_rate}")
    if args.recommended:
        known.set_defaults(**recommended_defaults(args))
        args = known.parse_args(argv)
    return args


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def recommended_defaults(args: argparse.Namespace) -> dict[str, Any]:
    """What `--recommended` changes in the adapter's and the spline's defaults; flags that are given still win."""
    from lslora import LSLoraConfig
    from lslora.config import RECOMMENDED
    from lslora.run_folder import earlier_settings
    from lslora.training import RECOMMENDED_SPLINE_LR

    steps = earlier_settings(args.output_dir).get("calibration_steps", 0) if args.resume else 0
    config = LSLoraConfig.recommended(r=args.r, calibration_steps=steps or max(1, args.max_steps // 3))
    changed = {name: getattr(config, name) for name in ("lora_alpha", *RECOMMENDED)}
    return changed | {"spline_lr": RECOMMENDED_SPLINE_LR}


def main(argv: list[str] | None = None) -> int:
    try:
        return run(parse_args(argv))
    except KeyboardInterrupt:
        print("error: interrupted; --resume goes on from the last checkpoint, if there is one", file=sys.stderr)
        return 128 + signal.SIGINT


def run(args: argparse.Namespace) -> int:
    """Check, train and report; the exit status."""
    from lslora.progress import hide_library_warnings, print_any_text
    from lslora.run_folder import alone_in

    print_any_text()
    if args.quiet:
        hide_library_warnings()
    with ExitStack() as held:
        try:
            held.enter_context(alone_in(args.output_dir))
            base, examples, eval_rows = check(args)
        except (ImportError, OSError, TypeError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        try:
            trainer = make_trainer(args, base, examples)
        except (ImportError, OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        try:
            return train(trainer, args, eval_rows)
        except (FloatingPointError, ImportError, OSError) as error:  # among them: a checkpoint that cannot be written
            print(f"error: {args.output_dir}: {error}", file=sys.stderr)
            return 1


def check(args: argparse.Namespace) -> tuple[BaseModel, list[Example], list[Row]]:
    """The base model, and the rows to learn and to answer, once all that can be told before a long wait is right.

    What else the run is made of is kept with its settings, `args`.
    """
    from lslora.base_model import BaseModel
    from lslora.data import are_conversations, load_examples, load_rows
    from lslora.files import sha256

    for name, value in vars(args).items():
        if isinstance(value, str) and not is_utf8(value):
            raise ValueError(f"{name} must be text in UTF-8, which the run's records are written in, got {value!a}")
    examples = load_examples(args.dataset_path, chat_template=args.chat_template)
    eval_rows = load_rows(args.eval_dataset_path) if args.eval_dataset_path else []
    args.chat_template = are_conversations(examples)  # the evaluation's rows are asked as the model was trained
    args.dataset_sha256 = sha256(args.dataset_path)
    args.rows_a_step = args.batch_size * args.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
    missing = missing_for(args)
    try:
        base = BaseModel(args.model_name)
        has_template = bool(base.tokenizer.chat_template)
        if args.chat_template and not has_template:
            missing.append(f"a chat template: the tokenizer of {base.name} has none, and conversations need one")
    except ValueError as error:
        missing.append(str(error))
    if missing:
        raise ValueError("this run cannot start here:\n" + "\n".join(f"- {m}" for m in missing))
    check_settings(args)
    return base, usable_examples(args, base, examples, eval_rows), eval_rows


def is_utf8(text: str) -> bool:
    """Whether a string can be written; a path that was given in other bytes cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def missing_for(args: argparse.Namespace) -> list[str]:
    """What the explicit choices in `args` need and is not there; told before anything is loaded."""
    import torch

    from lslora.run_folder import missing_to_begin, missing_to_resume

    missing, folder = [], args.output_dir
    if (args.load_in_4bit or "bit" in args.optim) and find_spec("bitsandbytes") is None:
        missing.append("bitsandbytes, for --load_in_4bit and 8-bit or paged optimizers: pip install 'lslora[quant]'")
    if args.optim.startswith("paged_") and not torch.cuda.is_available():
        missing.append(f"a CUDA device: --optim {args.optim} pages its state between GPU and CPU")
    for tracker in TRACKERS:
        if tracker in args.report_to and find_spec(tracker) is None:
            missing.append(f"{tracker}, for --report_to {tracker}: pip install {tracker}")
    return missing + (
        missing_to_resume(folder, settings_of(args), MAY_CHANGE) if args.resume else missing_to_begin(folder)
    )


def check_settings(args: argparse.Namespace) -> None:
    """ImportError, TypeError or ValueError for values that peft, transformers and trackers would refuse much later."""
    import torch
    from transformers import Trainer, get_scheduler
    from transformers.integrations import get_reporting_integration_callbacks

    if args.spline_lr is not None and not args.spline_lr > 0:
        raise ValueError(f"spline_lr must be positive, got {args.spline_lr}")
    if "all-linear" in args.target_modules and len(args.target_modules) > 1:
        raise ValueError(f"target_modules must be all-linear alone or names of layers, got {args.target_modules}")
    if not args.lora_alpha > 0 or not args.lora_dropout < 1:
        raise ValueError(
            f"lora_alpha must be positive and lora_dropout below 1, or nothing is learned, "
            f"got {args.lora_alpha} and {args.lora_dropout}"
        )
    if args.report_to != ["none"]:
        get_reporting_integration_callbacks(args.report_to)
    adapter_config(args)
    config, anything = trainer_config(args), torch.nn.Linear(1, 1)
    Trainer.get_optimizer_cls_and_kwargs(config, anything)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(anything.parameters(), lr=args.learning_rate)
    get_scheduler(config.lr_scheduler_type, optimizer, config.get_warmup_steps(args.max_steps), args.max_steps)


def usable_examples(
    args: argparse.Namespace, base: BaseModel, examples: list[Example], eval_rows: list[Row]
) -> list[Example]:
    """The examples of which something is left to learn; ValueError without any, or for rows that cannot be scored."""
    from lslora.evaluation import check_rows
    from lslora.lengths import fit_examples

    if base.positions is not None and args.max_length > base.positions:
        raise ValueError(f"max_length must be at most the model's {base.positions} tokens, got {args.max_length}")
    asked = {"chat_template": args.chat_template, "positions": base.positions}
    try:
        check_rows(base.tokenizer, eval_rows, **asked, place=lambda index: f"row {index + 1}")
    except ValueError as error:
        raise ValueError(f"{args.eval_dataset_path}: {error}") from error
    fit = fit_examples(base.tokenizer, examples, args.max_length, loss_on_prompt=args.loss_on_prompt)
    first_process = os.environ.get("RANK", "0") == "0"
    if first_process and (fit.dropped or (fit.longer and not args.quiet)):
        print(f"{args.dataset_path}: {fit}", file=sys.stderr)
    return fit.kept


def make_trainer(args: argparse.Namespace, base: BaseModel, examples: list[Example]) -> Any:
    """TRL's trainer with model, adapter and rows; ValueError for settings that the model does not take."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTTrainer

    from lslora.callback import SplineCallback
    from lslora.checkpoints import WholeCheckpointsMixin
    from lslora.order import LengthGroupedOrderMixin
    from lslora.progress import bars_hidden, hide_library_bars
    from lslora.training import SplineTrainerMixin

    class SplineSFTTrainer(SplineTrainerMixin, WholeCheckpointsMixin, LengthGroupedOrderMixin, SFTTrainer):
        def create_model_card(self, *_: Any, **__: Any) -> None:
            """None with every checkpoint: the folder's card is of the adapter beside it, and written with that."""

    if "wandb" in args.report_to:
        prepare_wandb(quiet=args.quiet)
    if bars_hidden(args.quiet):
        hide_library_bars()
    if args.quiet:
        logging.getLogger("lslora").setLevel(logging.ERROR)
    trainer = SplineSFTTrainer(
        model=load_model(args, base),
        args=trainer_config(args),
        train_dataset=Dataset.from_list([dict(example) for example in examples]),
        processing_class=base.tokenizer,
        peft_config=adapter_config(args),
        spline_lr=args.spline_lr,
        callbacks=[SplineCallback()] if args.method == "lslora" else [],
    )
    if trainer.is_world_process_zero() and not args.quiet:
        trainer.model.print_trainable_parameters()
    else:
        trainer.remove_callback(PrinterCallback)
    return trainer


def train(trainer: Any, args: argparse.Namespace, eval_rows: list[Row]) -> int:
    """Train, save and report; 0, or 128 + signal where one ended the training early."""
    from lslora.interruption import StopOnSignal
    from lslora.report import write_report
    from lslora.run_folder import earlier_evaluation, earlier_settings, steps_of, write_run

    tokenizer, speaks = trainer.processing_class, trainer.is_world_process_zero() and not args.quiet
    checkpoint = resume_point(trainer, args) if args.resume else None
    evaluation: dict[str, Any] = {}
    if checkpoint and steps_of(checkpoint) == args.max_steps:
        if not args.eval_dataset_path:  # the same adapter has answered these rows
            evaluation = earlier_evaluation(args.output_dir)
            args.eval_dataset_path = earlier_settings(args.output_dir).get("eval_dataset_path")
        begin(trainer, args, checkpoint, evaluation)
        load_finished(trainer, checkpoint)
    else:
        with StopOnSignal() as stop:
            trainer.add_callback(stop)
            trainer.add_callback(before_the_first_step(lambda: begin(trainer, args, checkpoint, {})))
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if stop.signal:
            return tell_stopped(trainer, stop.signal)
    save(trainer, Path(args.output_dir))
    write_card(trainer, args, evaluation.get("accuracy"))
    if args.method == "lslora":
        report_splines(trainer, args)
    elif trainer.is_world_process_zero():
        remove_splines(Path(args.output_dir))
    if eval_rows:
        evaluation = report_accuracy(trainer, tokenizer, eval_rows, args)
    write_card(trainer, args, evaluation.get("accuracy"))
    if trainer.is_world_process_zero():
        write_run(args.output_dir, settings_of(args), evaluation)
        report = write_report(args.output_dir)
    if speaks:
        print(f"\nAdapter, log and report are in {args.output_dir}; open {report}")
    return 0


def resume_point(trainer: Any, args: argparse.Namespace) -> Path | None:
    """The checkpoint to go on from, told together with those that are passed over."""
    from lslora.checkpoints import last_whole_checkpoint

    checkpoint, problems = last_whole_checkpoint(args.output_dir)
    if trainer.is_world_process_zero():
        for problem in problems:
            print(f"warning: passed over {problem}", file=sys.stderr)
        if not args.quiet:
            print(f"Going on from {checkpoint}")
    return checkpoint


def before_the_first_step(action: Callable[[], None]) -> Any:
    """A callback that acts when a training has all it needs, its optimizer and schedule included."""
    from transformers import TrainerCallback

    class BeforeTheFirstStep(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            action()

    return BeforeTheFirstStep()


def begin(
    trainer: Any,
    args: argparse.Namespace,
    checkpoint: Path | None,
    evaluation: Mapping[str, Any],
) -> None:
    """Make the folder this run's: `run.json` holds its settings, and nothing goes on from an earlier run."""
    from lslora.callback import DIAGNOSTICS
    from lslora.checkpoints import unseal
    from lslora.run_folder import STATE, write_run

    trainer.accelerator.wait_for_everyone()  # all have looked
    # A checkpoint brings its own save_steps and logging_steps, which may have changed since.
    trainer.state.compute_steps(trainer.args, trainer.state.max_steps)
    if trainer.is_world_process_zero():
        if checkpoint is None:
            unseal(args.output_dir)
            for name in (STATE, DIAGNOSTICS):  # of an earlier run, whose log a report would take for this one's
                Path(args.output_dir, name).unlink(missing_ok=True)
        write_run(args.output_dir, settings_of(args), evaluation)


def load_finished(trainer: Any, checkpoint: Path) -> None:
    """Take over a checkpoint that has all its steps behind it: transformers' loop would take one more."""
    from lslora.run_folder import STATE

    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = trainer.state.load_from_json(str(checkpoint / STATE))


def tell_stopped(trainer: Any, by: signal.Signals) -> int:
    if trainer.is_world_process_zero():
        step, folder = trainer.state.global_step, trainer.args.output_dir
        print(
            f"stopped by {by.name} after step {step}, with a checkpoint in {folder}; go on with --resume",
            file=sys.stderr,
        )
    return 128 + by


def save(trainer: Any, folder: Path) -> None:
    """The adapter and the log, each file whole or not at all."""
    from lslora.checkpoints import is_of_writing
    from lslora.files import publish
    from lslora.run_folder import STATE

    stage = folder / ".part"
    try:
        trainer.save_model(str(stage))
        if trainer.is_world_process_zero():
            trainer.state.save_to_json(str(stage / STATE))
            publish(stage, folder)
    except Exception as error:
        if not is_of_writing(error):
            raise
        raise OSError(f"the adapter could not be written: {error}") from error


def load_model(args: argparse.Namespace, base: BaseModel) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    quantization = None
    if args.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return base.load(dtype=dtype, quantization_config=quantization)


def adapter_config(args: argparse.Namespace) -> Any:
    from peft import LoraConfig

    from lslora import LSLoraConfig

    everything = args.target_modules == ["all-linear"]
    lora = {
        "r": args.r,
        "lora_alpha": args.lora_alpha,
        "lora_dropout": args.lora_dropout,
        "use_rslora": args.use_rslora,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "target_modules": "all-linear" if everything else args.target_modules,
    }
    if args.method == "lora":
        return LoraConfig(**lora)
    return LSLoraConfig(
        **lora,
        placement=args.placement,
        num_knots=args.num_knots,
        k_min=args.k_min,
        k_max=args.k_max,
        interpolation_method=args.interpolation_method,
        extrapolation=args.extrapolation,
        learn_scales=args.learn_scales,
        calibration_steps=args.calibration_steps,
        spline_reg_weight=args.spline_reg_weight,
    )


def trainer_config(args: argparse.Namespace) -> Any:
    import torch
    from trl import SFTConfig

    from lslora.progress import bars_hidden

    return SFTConfig(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        optim=args.optim,
        max_grad_norm=args.max_grad_norm,
        max_length=args.max_length,
        completion_only_loss=not args.loss_on_prompt,
        train_sampling_strategy="group_by_length" if args.group_by_length else "random",
        seed=args.seed,
        bf16=args.bf16,
        use_cpu=not torch.accelerator.is_available(),
        gradient_checkpointing=args.gradient_checkpointing,
        save_steps=args.save_steps,
        logging_steps=args.logging_steps,
        report_to=args.report_to,
        disable_tqdm=bars_hidden(args.quiet),
    )


def prepare_wandb(*, quiet: bool) -> None:
    """Let wandb write its run to disk where nobody is logged in, instead of asking for a key; silently if quiet."""
    import wandb

    if quiet:
        os.environ.setdefault("WANDB_SILENT", "true")
    if "WANDB_MODE" in os.environ or wandb.login(prompt=False):
        return
    os.environ["WANDB_MODE"] = "offline"
    wandb.teardown()  # it has read its settings by now, and reads them again after this
    if not quiet:
        print("wandb: no API key, so the run is written offline; send it later with: wandb sync wandb/offline-run-*")


def report_splines(trainer: Any, args: argparse.Namespace) -> None:
    """`spline_diagnostics.json`, pictures of the splines, and a table in the terminal."""
    from rich.console import Console

    from lslora import plots
    from lslora.callback import DIAGNOSTICS
    from lslora.diagnostics import observe_occupancy, spline_records
    from lslora.files import replacing
    from lslora.progress import bars_hidden
    from lslora.records import save_records, spline_table

    with observe_occupancy(trainer.model) as occupancy:
        run_batches(trainer, OCCUPANCY_BATCHES, silent=bars_hidden(args.quiet))
    records = spline_records(trainer.model, occupancy=occupancy)  # every process takes part: each may hold a shard
    if not trainer.is_world_process_zero():
        return
    folder = Path(args.output_dir)
    save_records(records, folder / DIAGNOSTICS)
    pictures = plots.plot_splines(records), plots.plot_deviations(records)
    for name, picture in zip(SPLINE_PICTURES, pictures, strict=True):
        with replacing(folder / f"{name}.png") as part:
            picture.savefig(part, dpi=130)
    if not args.quiet:
        Console().print(spline_table(records))


def remove_splines(folder: Path) -> None:
    """What an earlier run left in the folder of its splines: the adapter that is there now has none."""
    from lslora.callback import COURSE

    for name in (COURSE, *(f"{picture}.png" for picture in SPLINE_PICTURES)):
        (folder / name).unlink(missing_ok=True)


def run_batches(trainer: Any, count: int, *, silent: bool) -> None:
    """Forward passes over the first training batches, in eval mode."""
    import torch
    from tqdm import tqdm

    trainer.model.eval()
    steps = tqdm(range(count), desc="Looking at the splines", unit="batch", disable=silent)
    with torch.inference_mode():
        for _, batch in zip(steps, trainer.get_train_dataloader(), strict=False):
            batch.pop("labels")
            trainer.model(**batch)


def report_accuracy(trainer: Any, tokenizer: Any, rows: list[Row], args: argparse.Namespace) -> dict[str, Any]:
    """Answer the evaluation rows without and with the adapter; print both and how they differ.

    Every process answers all rows, since each may hold a shard of the model; the first one prints.

    Returns:
        `accuracy`, heading to summary, and their `comparison`.
    """
    from tqdm import tqdm

    from lslora.evaluation import evaluate
    from lslora.progress import bars_hidden
    from lslora.scoring import compare, format_comparison, format_table, summarize

    predictions = {}
    silent = bars_hidden(args.quiet) or not trainer.is_world_process_zero()
    for name, adapter in (("base", trainer.model.disable_adapter()), (args.method, nullcontext())):
        with adapter, tqdm(total=len(rows), desc=f"Answering ({name})", unit="row", disable=silent) as bar:
            predictions[name] = evaluate(
                trainer.model,
                tokenizer,
                rows,
                chat_template=args.chat_template,
                on_prediction=lambda _: bar.update(),
            )
    summaries = {name: summarize(found) for name, found in predictions.items()}
    comparison = compare(*predictions.values())
    if trainer.is_world_process_zero() and not args.quiet:
        print(f"\nAccuracy on {args.eval_dataset_path} in per cent, with 95 % intervals")
        print(format_table(summaries))
        print(f"\n{args.method} minus base")
        print(format_comparison(comparison))
    return {"accuracy": summaries, "comparison": comparison}


def write_card(trainer: Any, args: argparse.Namespace, accuracy: dict[str, Any] | None) -> None:
    if not trainer.is_world_process_zero():
        return
    from lslora.card import model_card
    from lslora.files import write_whole

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    card = model_card(args.model_name, args.method, settings_of(args), losses=losses, accuracy=accuracy)
    write_whole(Path(args.output_dir, "README.md"), card)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name not in ("output_dir", "resume", "quiet")}


if __name__ == "__main__":
    sys.exit(main())
