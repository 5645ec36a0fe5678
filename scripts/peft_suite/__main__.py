"""Run peft's own tests with LSLoraConfig in the place of LoraConfig, and with LoraConfig as the control.

    python scripts/peft_suite WORK [FILE ...]

fetches the installed peft's source package into the folder WORK, makes two copies of its tests, runs those that are
about the class, and prints what became of them: a test counts only if the control passes. Refusals are failures whose
error is one of the plugin's own; they are listed by message. Needs `pip install parameterized diffusers attrs`; models
of the hub are stood in for by small random ones (stand_ins.py).
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
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="scratch folder")
    parser.add_argument("files", nargs="*", default=["tests"], help="test files, all by default")
    args = parser.parse_args()
    work = args.work.resolve()
    fetch(work)
    subprocess.run([sys.executable, HERE / "stand_ins.py", work / "hub_cache"], check=True, env=environment(work))
    results = {}
    for name in ("LSLoraConfig", "LoraConfig"):
        copy_tests(work, name)
        results[name] = run(work, name, args.files)
    print(summary(results["LSLoraConfig"], results["LoraConfig"]))


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
    return os.environ | offline | {"PYTHONPATH": str(HERE)}


def run(work: Path, name: str, files: list[str]) -> dict[str, list[str]]:
    """Test → [outcome, error], under the names that the tests have with LoraConfig."""
    out = work / f"{name}.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "plugin", "-p", "no:cacheprovider", *files]
    settings = {"SUITE_CLASS": name, "SUITE_OUT": str(out)}
    subprocess.run(command, cwd=work / name, env=environment(work) | settings, check=False)
    return {test.replace(name, "LoraConfig"): found for test, found in json.loads(out.read_text()).items()}


def summary(ours: dict[str, list[str]], control: dict[str, list[str]]) -> str:
    counted = [test for test, (outcome, _) in control.items() if outcome == "passed"]
    passed = [test for test in counted if ours.get(test, ["missing"])[0] == "passed"]
    others = {test: ours.get(test, ["missing", "not collected"]) for test in counted if test not in set(passed)}
    refused = Counter(text for _, error in others.values() for text in REFUSALS if text in error)
    failed = {test: error for test, (_, error) in others.items() if not any(text in error for text in REFUSALS)}
    lines = [
        f"control (LoraConfig): {dict(Counter(outcome for outcome, _ in control.values()))}",
        f"of its {len(counted)} passing tests LSLoraConfig passes {len(passed)}, "
        f"refuses {sum(refused.values())}, fails {len(failed)}",
        *(f"  refused {count}: {text}" for text, count in refused.most_common()),
        *(f"  failed {test}: {error.splitlines()[0] if error else ''}" for test, error in failed.items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
