"""Run peft's own tests with LSLoraConfig in the place of LoraConfig, and the rest with LoraConfig as the control.

    python scripts/peft_suite WORK [FILE ...]

fetches the installed peft's source package into the folder WORK, makes two copies of its tests, runs those that are
about the class, then those of them that did not pass with LoraConfig itself, and prints what became of them: a failure
counts only if the control passes. Refusals are failures whose error is one of the plugin's own; they are listed by
message, and so is what no method with parameters of its own can pass. Needs `pip install parameterized diffusers attrs
pytest-xdist`; models of the hub are stood in for by small random ones (stand_ins.py). An hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
NOWHERE = "http://127.0.0.1:9"  # a port where nobody answers, so that no test waits for a hub
REFUSALS = (
    "LS-LoRA cannot be merged into the base weight",
    "LS-LoRA adapters cannot be combined into one",
    "is a LoRA variant of its own and does not combine with LS-LoRA",
    "init_lora_weights must be one of",
    "target_parameters merges the update into the parameter",
    "LS-LoRA does not support nn.MultiheadAttention",
    "LS-LoRA does not support base layers that peft adapts with",
    "'LSLORA' is not compatible with the `PeftMixedModel`",
    "which LS-LoRA does not support",
    "eva_config needs init_lora_weights='eva'",
    "megatron_config is not supported",
    "LoRA-FA needs an update linear in B",
    "an adapter must be saved as adapter_model.safetensors alone, got a pickle",
    "an adapter's name must have no dot, no slash and no control character",
    # peft's own, where it asks for plain LoRA by name
    "Cannot combine adapters with different peft types. Found PeftType.LSLORA",
    "Adapter of type PeftType.LSLORA is not supported for mixed models",
    "The provided model is not using LoRA",
)
# What only plain LoRA itself can pass: part of the test's name, part of the error, and why.
DIFFERENCES = (
    ("test_adapter_dtype_autocast", "assert False", "splines stay in float32, even with autocast_adapter_dtype=False"),
    ("no_autocast_adapter_dtype", "AssertionError", "splines stay in float32, even with autocast_adapter_dtype=False"),
    (
        "test_only_params_are_updated",
        "assert not True",
        "at its learning rate of 0.5 the update leaves the grid, and clamped it has no gradient",
    ),
    ("TestRequiresGrad", "lora_spline", "it lists all trainable parameters by name"),
    ("TestTunerStateDictKeyPrefixes", "lora_spline", "it lists all saved tensors by name"),
    ("test_lora_plus_embedding_lr", "lora_spline", "it lists all trainable parameters by name"),
    ("TestModelAndLayerStatus", "LSLora", "it names plain LoRA's classes"),
    ("TestLayerRepr", "assert False", "it names plain LoRA's classes"),
    ("TestModelCard", "assert", "it asks for the tag of plain LoRA, the only method that peft gives one"),
    ("TestModelAndLayerStatus", "LSLORA", "it names plain LoRA's peft_type"),
    ("TestModelAndLayerStatus", "_params=", "it counts plain LoRA's parameters"),
    ("_raises", "lslora.layer.LSLora", "its message names plain LoRA's layer"),
    ("TestHotSwapping", "LSLORA", "its message names plain LoRA's peft_type"),
    ("TestLoraConversion", "isinstance(LoraConfig(", "what it converts to is plain LoRA, as it should be"),
    ("test_converted_lora_to_lora", "DID NOT WARN", "only linear updates can be converted: refused"),
    ("tie_word_embeddings_config", "Setting.*tie_word_embeddings", "it merges: refused before it warns"),
    ("TestXlora", "Got unexpected keys", "X-LoRA loads adapters of plain LoRA alone, and says so"),
    ("eva_config_but_not_eva_init", "DID NOT WARN", "refused with an error, where plain LoRA warns and ignores it"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="scratch folder")
    parser.add_argument("files", nargs="*", default=["tests"], help="test files, all by default")
    args = parser.parse_args()
    work = args.work.resolve()
    fetch(work)
    subprocess.run([sys.executable, HERE / "stand_ins.py", work / "hub_cache"], check=True, env=environment(work))
    ours = run(work, "LSLoraConfig", args.files)
    control = run(work, "LoraConfig", args.files, [test for test, (outcome, _) in ours.items() if outcome != "passed"])
    print(summary(ours, control))


def fetch(work: Path) -> None:
    """The source package of the peft that is installed, unpacked to `work/source`."""
    if (work / "source").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    requirement = f"peft=={version('peft')}"
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", work, requirement]
    subprocess.run(download, check=True)
    with tarfile.open(next(work.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(work, filter="data")
    next(path for path in work.glob("peft-*") if path.is_dir()).rename(work / "source")


def copy_tests(work: Path, name: str) -> None:
    """The tests in a folder of their own, with `name` wherever they say LoraConfig."""
    folder = work / name / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").touch()
    for path in (work / "source" / "tests").glob("*.py"):
        text = re.sub(r"\bLoraConfig\b", name, path.read_text(encoding="utf-8"))
        (folder / path.name).write_text(text, encoding="utf-8")


def environment(work: Path) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": NOWHERE, "HF_HOME": str(work / "hub_cache")}
    return os.environ | offline | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}


def run(work: Path, name: str, files: list[str], only: list[str] | None = None) -> dict[str, list[str]]:
    """Test → [outcome, error], under the names that the tests have with LoraConfig; of all tests, or of these."""
    copy_tests(work, name)
    out, chosen = work / f"{name}.json", work / f"{name}_only.json"
    chosen.write_text(json.dumps(only), encoding="utf-8")
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "-p", "plugin", "-p", "no:cacheprovider", *files]
    settings = {"SUITE_CLASS": name, "SUITE_OUT": str(out), "SUITE_ONLY": str(chosen)}
    subprocess.run(command, cwd=work / name, env=environment(work) | settings, check=False)
    return {
        test.replace(name, "LoraConfig"): found for test, found in json.loads(out.read_text(encoding="utf-8")).items()
    }


def outcomes(found: dict[str, list[str]]) -> dict[str, int]:
    return dict(Counter(outcome for outcome, _ in found.values()))


def summary(ours: dict[str, list[str]], control: dict[str, list[str]]) -> str:
    others = {test: ours[test][1] for test, (outcome, _) in control.items() if outcome == "passed"}
    refused, different, failed = Counter[str](), Counter[str](), {}
    for test, error in others.items():
        if text := next((text for text in REFUSALS if text in error), None):
            refused[text] += 1
        elif why := next((why for name, text, why in DIFFERENCES if name in test and text in error), None):
            different[why] += 1
        else:
            failed[test] = error
    lines = [
        f"LSLoraConfig: {outcomes(ours)}; of those that did not pass, LoraConfig: {outcomes(control)}",
        f"of the {len(others)} that only LoraConfig passes, LSLoraConfig refuses {sum(refused.values())}, "
        f"differs by design in {sum(different.values())}, fails {len(failed)}",
        *(f"  refused {count}: {text}" for text, count in refused.most_common()),
        *(f"  differs {count}: {why}" for why, count in different.most_common()),
        *(f"  failed {test}: {error.splitlines()[0] if error else ''}" for test, error in failed.items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
