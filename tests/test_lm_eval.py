"""lm-evaluation-harness loads an adapter of ours, and chooses on every row what `eval_lslora.py` chooses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lslora import LSLoraConfig, Spline
from lslora.answers import options_of
from lslora.data import to_prompt_completion
from lslora.evaluation import evaluate
from lslora.lm_eval import main, write_task

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "lm_evaluation_harness.md"

# Options of one token and of several, of equal and of unequal length; texts that a template engine would change.
OPTIONS = (
    ("true", "false"),
    ("answer1", "answer2", "answer3"),
    ("yes", "no", "certainly", "not-at-all"),
    ("ä", "ö", "ü", "é", "è"),
)
QUESTIONS = (
    "Is the sky blue?",
    "Which of them is {{ answer }}, and which is {% not %}?",
    "Who\u2028sleeps for long periods of time during the winter months, squirrels or 🐻s?",
)
# Two loads of one model in fp32, asked in batches of other sizes and with other padding, were 2e-5 apart.
TOLERANCE = 1e-4

# Folders of lm-eval with the tasks that the guide names; to read them all takes it 15 seconds.
TASK_FOLDERS = ["super_glue", "piqa", "siqa", "hellaswag", "winogrande", "arc", "openbookqa", "gsm8k", "mmlu"]


def make_row(number):
    options = OPTIONS[number % 4]
    answer = options[number % len(options)]
    return {
        "instruction": f"{QUESTIONS[number % 3]}\n\nAnswer format: {'/'.join(options)}",
        "input": "some further context" if number % 5 == 0 else "",
        "output": f"the correct answer is {answer}" + ", indeed" * (number % 2),
        "answer": answer,
        "task": "",
    }


ROWS = [make_row(number) for number in range(24)]


def make_tokenizer():
    """Merges learnt from the rows, and a token put before every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["".join(to_prompt_completion(row).values()) for row in ROWS], trainer)
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds `base`, `adapter` (its splines far from the identity) and `tasks`."""
    folder = tmp_path_factory.mktemp("lm_eval")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1))
    for parameter in model.parameters():
        if parameter.dim() > 1:  # weights large enough that the predictions differ from token to token
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    config = LSLoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    for spline in tuned.modules():
        if isinstance(spline, Spline):
            spline.values = [1.0, -2.0, 0.5, 3.0, -1.0]
    tuned.save_pretrained(folder / "adapter")
    write_task(ROWS, folder / "tasks", "rows")
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    """Predictions with the adapter, with its splines made the identity, and of the base, as `eval_lslora.py` does."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    tuned = PeftModel.from_pretrained(base, folder / "adapter")
    found = {"adapter": evaluate(tuned, tokenizer, ROWS, scorer="likelihood", batch_size=5)}
    for spline in tuned.modules():
        if isinstance(spline, Spline):
            spline.values = spline.grid
    found["straight"] = evaluate(tuned, tokenizer, ROWS, scorer="likelihood")
    with tuned.disable_adapter():
        found["base"] = evaluate(tuned, tokenizer, ROWS, scorer="likelihood")
    return found


def run_command(folder, output):
    """What `python -m lslora.lm_eval` writes with the adapter: its results and its samples."""
    model = ("--model", "hf", "--model_args", f"pretrained={folder / 'base'},peft={folder / 'adapter'}")
    task = ("--tasks", "rows", "--include_path", folder / "tasks", "--batch_size", 4, "--device", "cpu")
    command = [sys.executable, "-m", "lslora.lm_eval", *model, *task, "--log_samples", "--output_path", output]
    environment = os.environ | {"HF_HOME": str(output)}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (results,), (samples,) = output.rglob("results_*.json"), output.rglob("samples_rows_*.jsonl")
    lines = samples.read_text(encoding="utf-8").split("\n")
    return json.loads(results.read_text(encoding="utf-8")), [json.loads(line) for line in lines if line]


def relative(log_likelihoods):
    """Log-likelihoods minus the first option's: lm-eval counts the prompt's last line break to every completion."""
    return [value - log_likelihoods[0] for value in log_likelihoods]


def assert_same_choices(samples, predictions):
    assert sorted(sample["doc_id"] for sample in samples) == list(range(len(ROWS)))
    for sample in samples:
        prediction, options = predictions[sample["doc_id"]], options_of(ROWS[sample["doc_id"]])
        theirs = [float(value) for value, _ in sample["filtered_resps"]]
        assert len(theirs) == len(options)
        assert options[theirs.index(max(theirs))] == prediction["prediction"]
        assert sample["acc"] == prediction["correct"]
        assert relative(theirs) == pytest.approx(relative(list(prediction["log_likelihoods"].values())), abs=TOLERANCE)


def test_the_command_chooses_what_we_choose_on_every_row(folder, ours, tmp_path):
    results, samples = run_command(folder, tmp_path)
    assert_same_choices(samples, ours["adapter"])
    accuracy = sum(item["correct"] for item in ours["adapter"]) / len(ROWS)
    assert results["results"]["rows"]["acc,none"] == pytest.approx(accuracy)
    for other in ("base", "straight"):  # which make other choices, so adapter and splines were at work
        with pytest.raises(AssertionError):
            assert_same_choices(samples, ours[other])
        assert any(a["prediction"] != b["prediction"] for a, b in zip(ours["adapter"], ours[other], strict=True))


def test_in_process_and_without_adapter(folder, ours, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder / "base")},
        tasks=["rows"],
        task_manager=TaskManager(include_path=[folder / "tasks"], include_defaults=False),
        batch_size=7,
        device="cpu",
        bootstrap_iters=0,
    )
    assert_same_choices(results["samples"]["rows"], ours["base"])


def test_tasks_that_the_guide_names_exist():
    named = {
        name for tasks in re.findall(r"--tasks (\S+)", GUIDE.read_text(encoding="utf-8")) for name in tasks.split(",")
    }
    installed = Path(lm_eval.__file__).parent / "tasks"
    manager = TaskManager(include_path=[installed / name for name in TASK_FOLDERS], include_defaults=False)
    assert len(named) == 11
    assert named - set(manager.all_tasks) == {"mine"}  # the guide's own


def test_the_guide_writes_its_task(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    manager = TaskManager(include_path=[tmp_path / "tasks"], include_defaults=False)
    assert manager.all_tasks == ["mine"]


@pytest.mark.parametrize("name", ["", "a,b", "a/b", "a b", "mmlu*"])
def test_names_that_would_not_find_their_task_are_refused(tmp_path, name):
    with pytest.raises(
        ValueError, match=f"name must be made of letters, digits, _ and -, got {re.escape(repr(name))}"
    ):
        write_task(ROWS, tmp_path / "tasks", name)


def test_rows_that_cannot_be_asked_so_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rows must hold at least one row"):
        write_task([], tmp_path / "tasks", "rows")
    free = ROWS[0] | {"instruction": "How many?"}
    with pytest.raises(ValueError, match="row with index 1: the likelihood needs an instruction"):
        write_task([ROWS[0], free], tmp_path / "tasks", "rows")
    assert not (tmp_path / "tasks").exists()


def test_without_lm_eval_one_sentence_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])  # where it cannot be found
    with pytest.raises(SystemExit, match=r"needs lm-evaluation-harness: pip install 'lslora\[eval\]'"):
        main()
