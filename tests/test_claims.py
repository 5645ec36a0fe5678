"""The figures in the tables of README and docs/results.md are what the recorded runs give, to the digit shown."""

import re
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import pytest

from benchmarks import report
from benchmarks.quality import RESULTS, load_records, read_plan

ROOT = Path(__file__).parents[1]
PLANS = ROOT / "benchmarks" / "plans"
README, DOCS = ROOT / "README.md", ROOT / "docs" / "results.md"
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e-?\d+)?")


class Claim(NamedTuple):
    """A row of a table: how it begins, the runs it tells of ("method lr"), and what its numbers are, in their order.

    `ours` is what the row is about, `base` what it is compared with, `line` a second method that is.
    """

    page: Path
    start: str
    plan: str
    r: int
    ours: str
    figures: str
    base: str = ""
    line: str = ""
    rows: str = report.ODD
    seeds: range = range(100)


ADDED = "base mean of_low of_high even_mean ahead n p"  # the interval is of other rows too
ALL_LAYERS = "seeds nll mean low high p even_mean even_p"
COMPARED = "n base mean of_low of_high p"
WITH_LINE = COMPARED + " line line_n over_line over_line_p"
TABLE = "seeds nll mean low high p"
ANSWERED = "seeds nll mean low high p accuracy answered answered_low answered_high answered_p"
ARC, ARC_ALL, ARC_QWEN, ARC_SMALL = "arc_easy", "arc_easy_all_layers_short", "arc_easy_qwen", "arc_easy_small_batches"
MATH, MATH_ALL, MATH_SMALL, NEW = "math", "math_all_layers_short", "math_small_batches", "math_test"
RECOMMENDED = "**LS-LoRA, recommended**"

# fmt: off
CLAIMS = [
    Claim(README, "**all 30**, SmolLM2 | ARC-Easy | 16 | 10 r", ARC_ALL, 16, "spline_0.05 5e-4", ADDED, "lora 5e-4"),
    Claim(README, "**all 30**, SmolLM2 | math | 16 | 10 r", MATH_ALL, 16, "spline_0.05 1e-3", ADDED, "lora 1e-3"),
    Claim(README, "**all 30**, SmolLM2 | math | 16 | 20 r", MATH_ALL, 16, "spline_20 5e-4", ADDED, "lora_20 5e-4"),
    Claim(README, "**all 30**, SmolLM2 | math | 16 | 10 r; the spline on 40 r", MATH_ALL, 16, "spline_40 3.5e-4",
          ADDED, "lora 1e-3"),
    Claim(README, "**all 30**, SmolLM2 | ARC-Easy | 4 | 20 r", ARC_ALL, 4, "rslora_0.05 1e-3", ADDED, "rslora 1e-3"),
    Claim(README, "**all 30**, SmolLM2 | math | 4 | 40 r", MATH_ALL, 4, "spline_40 7e-4", ADDED, "lora_40 7e-4"),
    Claim(README, "10 of 30, SmolLM2 | ARC-Easy | 16 | 10 r", ARC, 16, "spline_0.05 1.4e-3", ADDED + " line",
          "lora 1.4e-3", "line_0.05 1.4e-3"),
    Claim(README, "10 of 30, SmolLM2 | math | 16 | 40 r", MATH, 16, "rslora_60 7e-4", ADDED + " line",
          "rslora 7e-4", "line_rslora_60 7e-4"),
    Claim(README, "10 of 30, SmolLM2 | math, new rows | 4 | 20 r; the spline on 40 r", NEW, 4, "spline_40 2e-3",
          "base mean of_low of_high ahead n p", "rslora 2.8e-3", rows=report.ALL),
    Claim(README, "10 of 30, SmolLM2 | ARC-Easy | 4 | 20 r", ARC, 4, "output_rslora 2e-3", ADDED, "rslora 2e-3"),
    Claim(README, "6 of 24, Qwen2.5-Coder | ARC-Easy | 16 | 10 r", ARC_QWEN, 16, "spline_0.05 2.5e-4",
          ADDED + " line line_n", "lora 2.5e-4", "line_0.05 2.5e-4"),

    Claim(DOCS, "ARC-Easy | LoRA | 5e-4", ARC_ALL, 16, "lora 5e-4", "seeds nll"),
    Claim(DOCS, f"ARC-Easy | {RECOMMENDED} | 5e-4", ARC_ALL, 16, "spline_0.05 5e-4", ALL_LAYERS, "lora 5e-4"),
    Claim(DOCS, "ARC-Easy | LoRA on 5 r, minus LoRA on 10 r | 1e-3", ARC_ALL, 16, "lora_5 1e-3", ALL_LAYERS,
          "lora 5e-4"),
    Claim(DOCS, "ARC-Easy | LS-LoRA, recommended, on 5 r, minus LoRA on 5 r, seeds 0 to 2 | 1e-3", ARC_ALL, 16,
          "spline_5 1e-3", ALL_LAYERS, "lora_5 1e-3"),
    Claim(DOCS, "ARC-Easy | LS-LoRA, recommended, 10 r, minus LoRA, 10 r, seeds 0 to 2 | 1.4e-3", ARC_ALL, 4,
          "spline_0.05 1.4e-3", ALL_LAYERS, "lora 1.4e-3"),
    Claim(DOCS, "ARC-Easy | LoRA, 10 r, minus LoRA, 20 r | 1.4e-3", ARC_ALL, 4, "lora 1.4e-3", ALL_LAYERS,
          "rslora 1e-3"),
    Claim(DOCS, "ARC-Easy | LoRA through a learned straight line | 5e-4", ARC_ALL, 16, "line_0.05 5e-4",
          "seeds mean low high p even_mean even_p", "lora 5e-4"),
    Claim(DOCS, "ARC-Easy | splines in the upper ten layers, plain LoRA below | 5e-4", ARC_ALL, 16, "upper_0.05 5e-4",
          "seeds mean low high p even_mean even_p", "lora 5e-4"),
    Claim(DOCS, "ARC-Easy | the spline at a rate of 0.017 instead of 0.05 | 5e-4", ARC_ALL, 16, "spline_0.017 5e-4",
          "seeds mean low high p even_mean even_p", "lora 5e-4"),
    Claim(DOCS, "ARC-Easy | the spline at a rate of 0.005 | 5e-4", ARC_ALL, 16, "spline_0.005 5e-4",
          "seeds mean low high p even_mean even_p", "lora 5e-4"),
    Claim(DOCS, "math | LoRA | 1e-3", MATH_ALL, 16, "lora 1e-3", "seeds nll"),
    Claim(DOCS, f"math | {RECOMMENDED} | 1e-3", MATH_ALL, 16, "spline_0.05 1e-3", ALL_LAYERS, "lora 1e-3"),
    Claim(DOCS, "math | the same, on the eight seeds that were to confirm it (8 to 15) | 1e-3", MATH_ALL, 16,
          "spline_0.05 1e-3", ALL_LAYERS, "lora 1e-3", seeds=range(8, 16)),
    Claim(DOCS, "math | LoRA (`--lr 7e-4`) | 7e-4", MATH_ALL, 16, "lora 7e-4", "seeds nll"),
    Claim(DOCS, "math | LS-LoRA, recommended | 7e-4", MATH_ALL, 16, "spline_0.05 7e-4", ALL_LAYERS, "lora 7e-4"),
    Claim(DOCS, "math | LoRA on 20 r | 5e-4", MATH_ALL, 16, "lora_20 5e-4", "seeds nll"),
    Claim(DOCS, "math | **LS-LoRA, recommended, on 20 r**, minus LoRA on 20 r | 5e-4", MATH_ALL, 16,
          "spline_20 5e-4", ALL_LAYERS, "lora_20 5e-4"),
    Claim(DOCS, "math | the same, on the four seeds that were to confirm it (8 to 11) | 5e-4", MATH_ALL, 16,
          "spline_20 5e-4", ALL_LAYERS, "lora_20 5e-4", seeds=range(8, 12)),
    Claim(DOCS, "math | LoRA on 40 r, seeds 0 to 3 | 3.5e-4", MATH_ALL, 16, "lora_40 3.5e-4", "seeds nll",
          seeds=range(4)),
    Claim(DOCS, "math | LS-LoRA, recommended, on 40 r, minus LoRA on 40 r, seeds 0 to 3 | 3.5e-4", MATH_ALL, 16,
          "spline_40 3.5e-4", ALL_LAYERS, "lora_40 3.5e-4", seeds=range(4)),
    Claim(DOCS, "math | a straight line, on 40 r, minus LoRA on 40 r, seeds 0 to 3 | 3.5e-4", MATH_ALL, 16,
          "line_40 3.5e-4", ALL_LAYERS, "lora_40 3.5e-4", seeds=range(4)),
    Claim(DOCS, "math | **LS-LoRA, recommended, on 40 r**, minus LoRA on 10 r at 1e-3 | 3.5e-4", MATH_ALL, 16,
          "spline_40 3.5e-4", ALL_LAYERS, "lora 1e-3"),
    Claim(DOCS, "math | the same, on the eight seeds that were to confirm it (8 to 15) | 3.5e-4", MATH_ALL, 16,
          "spline_40 3.5e-4", ALL_LAYERS, "lora 1e-3", seeds=range(8, 16)),
    Claim(DOCS, "math | LS-LoRA, recommended, on 40 r, minus LoRA on 20 r at 5e-4, seeds 0 to 11 | 3.5e-4", MATH_ALL,
          16, "spline_40 3.5e-4", ALL_LAYERS, "lora_20 5e-4", seeds=range(12)),
    Claim(DOCS, "ARC-Easy | LoRA, 20 r | 1e-3", ARC_ALL, 4, "rslora 1e-3", "seeds nll"),
    Claim(DOCS, f"ARC-Easy | {RECOMMENDED}, 20 r | 1e-3", ARC_ALL, 4, "rslora_0.05 1e-3", ALL_LAYERS, "rslora 1e-3"),
    Claim(DOCS, "math | LoRA, 40 r | 7e-4", MATH_ALL, 4, "lora_40 7e-4", "seeds nll"),
    Claim(DOCS, f"math | {RECOMMENDED}, 40 r | 7e-4", MATH_ALL, 4, "spline_40 7e-4", ALL_LAYERS, "lora_40 7e-4"),

    Claim(DOCS, "ARC-Easy | 16 | 10 r, 1.4e-3", ARC, 16, "spline_0.05 1.4e-3", WITH_LINE, "lora 1.4e-3",
          "line_0.05 1.4e-3"),
    Claim(DOCS, "math | 16 | rsLoRA, 7e-4", MATH, 16, "rslora_60 7e-4", WITH_LINE, "rslora 7e-4",
          "line_rslora_60 7e-4"),
    Claim(DOCS, "ARC-Easy, Qwen2.5-Coder-0.5B | 16 | 10 r, 2.5e-4", ARC_QWEN, 16, "spline_0.05 2.5e-4", WITH_LINE,
          "lora 2.5e-4", "line_0.05 2.5e-4"),
    Claim(DOCS, "ARC-Easy | 64 | 10 r, 5e-4", ARC, 64, "spline_0.05 5e-4", WITH_LINE, "lora 5e-4", "line_0.05 5e-4"),
    Claim(DOCS, "math | 64 | 10 r, 7e-4", MATH, 64, "spline_0.05 7e-4", WITH_LINE, "lora 7e-4", "line_0.05 7e-4"),
    Claim(DOCS, "math, new rows | 4 | rsLoRA, 2.8e-3; the spline on 40 r, 2e-3", NEW, 4, "spline_40 2e-3", COMPARED,
          "rslora 2.8e-3", rows=report.ALL),
    Claim(DOCS, "math, new rows | 4 | 40 r, 2e-3", NEW, 4, "spline_40 2e-3", COMPARED, "lora_40 2e-3",
          rows=report.ALL),
    Claim(DOCS, "math | 4 | 40 r, 2e-3", MATH, 4, "spline_40 2e-3", WITH_LINE, "lora_40 2e-3", "line_40 2e-3"),
    Claim(DOCS, "math | 4 | rsLoRA, 2.8e-3", MATH, 4, "output_rslora 2.8e-3", WITH_LINE, "rslora 2.8e-3",
          "line_rslora 2.8e-3"),
    Claim(DOCS, "ARC-Easy | 4 | rsLoRA, 2e-3", ARC, 4, "output_rslora 2e-3", COMPARED, "rslora 2e-3"),
    Claim(DOCS, "ARC-Easy | 4 | 40 r, 1.4e-3", ARC, 4, "spline_40 1.4e-3", COMPARED, "lora_40 1.4e-3"),
    Claim(DOCS, "ARC-Easy | 4 | 10 r, 2e-3", ARC, 4, "output_fast 2e-3", COMPARED, "lora 2e-3"),

    Claim(DOCS, "16 | LoRA | 2e-3", MATH, 16, "lora 2e-3", "seeds nll"),
    Claim(DOCS, f"16 | {RECOMMENDED} | 2.4e-3", MATH, 16, "output_fast 2.4e-3", TABLE, "lora 2e-3"),
    Claim(DOCS, "16 | the same, on the five seeds that had no part in choosing it (5 to 9) | 2.4e-3", MATH, 16,
          "output_fast 2.4e-3", TABLE, "lora 2e-3", seeds=range(5, 10)),
    Claim(DOCS, "16 | the same with `use_rslora` | 7e-4", MATH, 16, "output_rslora 7e-4", TABLE, "lora 2e-3"),
    Claim(DOCS, "16 | rsLoRA | 7e-4", MATH, 16, "rslora 7e-4", TABLE, "lora 2e-3"),
    Claim(DOCS, "16 | rsLoRA through a learned straight line (scale and shift) | 7e-4", MATH, 16, "line_rslora 7e-4",
          TABLE, "lora 2e-3"),
    Claim(DOCS, "16 | LS-LoRA in the bottleneck | 2.8e-3", MATH, 16, "bottleneck_fast 2.8e-3", TABLE, "lora 2e-3"),
    Claim(DOCS, "16 | LoRA through a learned straight line | 2.8e-3", MATH, 16, "line_fast 2.8e-3", TABLE,
          "lora 2e-3"),
    Claim(DOCS, "4 | LoRA | 4e-3", MATH, 4, "lora 4e-3", "seeds nll"),
    Claim(DOCS, f"4 | {RECOMMENDED} | 4e-3", MATH, 4, "output_fast 4e-3", TABLE, "lora 4e-3"),
    Claim(DOCS, "4 | the same with `use_rslora` | 2.8e-3", MATH, 4, "output_rslora 2.8e-3", TABLE, "lora 4e-3"),
    Claim(DOCS, "4 | rsLoRA | 2.8e-3", MATH, 4, "rslora 2.8e-3", TABLE, "lora 4e-3"),
    Claim(DOCS, "4 | rsLoRA through a learned straight line | 2.8e-3", MATH, 4, "line_rslora 2.8e-3", TABLE,
          "lora 4e-3"),
    Claim(DOCS, "4 | LS-LoRA in the bottleneck | 4e-3", MATH, 4, "bottleneck_fast 4e-3", TABLE, "lora 4e-3"),
    Claim(DOCS, "4 | LoRA through a learned straight line | 5.6e-3", MATH, 4, "line_fast 5.6e-3", TABLE, "lora 4e-3"),

    Claim(DOCS, "16 | LoRA | 1.4e-3", ARC, 16, "lora 1.4e-3", "seeds nll accuracy"),
    Claim(DOCS, f"16 | {RECOMMENDED} | 1.4e-3", ARC, 16, "output_fast 1.4e-3", ANSWERED, "lora 1.4e-3"),
    Claim(DOCS, "16 | LoRA through a learned straight line, at this rate alone | 1.4e-3", ARC, 16, "line_fast 1.4e-3",
          ANSWERED, "lora 1.4e-3"),
    Claim(DOCS, "16 | the same with `use_rslora` | 5e-4", ARC, 16, "output_rslora 5e-4", ANSWERED, "lora 1.4e-3"),
    Claim(DOCS, "16 | rsLoRA | 5e-4", ARC, 16, "rslora 5e-4", ANSWERED, "lora 1.4e-3"),

    Claim(DOCS, "4 | LoRA, seeds 0 to 2 | 2e-3", ARC, 4, "lora 2e-3", "seeds nll accuracy", seeds=range(3)),
    Claim(DOCS, f"4 | {RECOMMENDED} | 2e-3", ARC, 4, "output_fast 2e-3", ANSWERED, "lora 2e-3"),
    Claim(DOCS, "4 | the same with `use_rslora` | 2e-3", ARC, 4, "output_rslora 2e-3", ANSWERED, "lora 2e-3",
          seeds=range(3)),

    Claim(DOCS, "ARC-Easy | 16 | LoRA | 7e-4", ARC_SMALL, 16, "lora 7e-4", "seeds nll accuracy"),
    Claim(DOCS, f"ARC-Easy | 16 | {RECOMMENDED} | 7e-4", ARC_SMALL, 16, "output_fast 7e-4",
          "seeds nll mean low high p answered answered_low answered_high answered_p", "lora 7e-4"),
    Claim(DOCS, "ARC-Easy | 4 | LoRA | 1.4e-3", ARC_SMALL, 4, "lora 1.4e-3", "seeds nll accuracy"),
    Claim(DOCS, f"ARC-Easy | 4 | {RECOMMENDED} | 1.4e-3", ARC_SMALL, 4, "output_fast 1.4e-3",
          "seeds nll mean low high p answered answered_low answered_high answered_p", "lora 1.4e-3"),
    Claim(DOCS, "math | 16 | LoRA | 1e-3", MATH_SMALL, 16, "lora 1e-3", "seeds nll"),
    Claim(DOCS, f"math | 16 | {RECOMMENDED} | 1.4e-3", MATH_SMALL, 16, "output_fast 1.4e-3", TABLE, "lora 1e-3"),
    Claim(DOCS, "math | 16 | both, at one rate (`--lr 1.2e-3`) | 1.2e-3", MATH_SMALL, 16, "output_fast 1.2e-3",
          "seeds mean low high p", "lora 1.2e-3"),
]
# fmt: on


@cache
def plan_cells(plan):
    _, runs = read_plan(PLANS / f"{plan}.toml")
    return report.group(load_records(runs, RESULTS / plan))


def cell(claim, runs):
    """The records of "method lr", as the only learning rate of their method."""
    name, lr = runs.split()
    records = plan_cells(claim.plan)[claim.r, name][float(lr)]
    return {float(lr): {seed: record for seed, record in records.items() if seed in claim.seeds}}


def mean(records, metric, rows):
    return fmean(report.score(record, metric, rows) for record in records)


def computed(claim):
    """Every figure that a row can have, by name."""
    (ours,) = (own := cell(claim, claim.ours)).values()
    found = {"seeds": len(ours), "nll": mean(ours.values(), "nll", claim.rows)}
    if "accuracy" in claim.figures:
        found["accuracy"] = mean(ours.values(), "accuracy", claim.rows)
    if not claim.base:
        return found
    (theirs,) = (base := cell(claim, claim.base)).values()
    common = ours.keys() & theirs.keys()
    found["base"] = mean([theirs[seed] for seed in common], "nll", claim.rows)
    pairs = [[report.score(side[seed], "nll", claim.rows) for side in (ours, theirs)] for seed in common]
    found["ahead"] = sum(a < b for a, b in pairs)
    found["n"], *rest, (found["of_low"], found["of_high"]) = report.difference(own, base, "nll", claim.rows)
    found |= zip(("mean", "low", "high", "p"), rest, strict=True)
    even = report.difference(own, base, "nll", report.EVEN)
    found |= {"even_mean": even.mean, "even_p": even.p}
    if "answered" in claim.figures:
        _, *rest, _ = report.difference(own, base, "accuracy", claim.rows)
        found |= zip(("answered", "answered_low", "answered_high", "answered_p"), rest, strict=True)
    if claim.line:
        line = cell(claim, claim.line)
        found["line_n"], found["line"], *_ = report.difference(line, base, "nll", claim.rows)
        _, found["over_line"], _, _, found["over_line_p"], _ = report.difference(own, line, "nll", claim.rows)
    return found


def is_rounded(text, value):
    """Whether the number in the text is the value to the digits that it shows."""
    mantissa, _, exponent = text.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return abs(float(text) - value) <= 0.5001 * 10 ** (int(exponent or 0) - decimals)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.page.name}: {claim.start}")
def test_a_row_says_what_the_runs_give(claim):
    (line,) = re.findall(rf"^\| {re.escape(claim.start)} \|(.*)$", claim.page.read_text(encoding="utf-8"), re.M)
    shown = NUMBER.findall(line.replace("−", "-"))
    names, values = claim.figures.split(), computed(claim)
    assert len(shown) == len(names), (shown, names)
    wrong = {
        name: (text, values[name])
        for name, text in zip(names, shown, strict=True)
        if not is_rounded(text, values[name])
    }
    assert not wrong


@pytest.mark.parametrize("page", [README, DOCS], ids=lambda page: page.name)
def test_every_row_of_results_is_a_claim(page):
    """Rows with a figure of four decimals, which is how a loss is shown."""
    rows = re.findall(r"^\| (.*\d\.\d{4}.*)$", page.read_text(encoding="utf-8"), re.M)
    starts = tuple(f"{claim.start} |" for claim in CLAIMS if claim.page == page)
    assert rows and [row for row in rows if not row.startswith(starts)] == []


def test_method_md_says_how_much_of_the_default_grid_is_reached():
    (record,) = plan_cells("ablation")[16, "v7"][2e-4].values()
    beside_zero = [sum(spline["occupancy"][2:4]) for spline in record["splines"]]
    text = " ".join((ROOT / "docs" / "method.md").read_text(encoding="utf-8").split())
    found = re.search(r"at least ([\d.]+) % of z in the two .* each of (\d+) layers, and all of it in (\d+) ", text)
    share, layers, full = map(float, found.groups())
    assert share <= 100 * min(beside_zero) < share + 0.5
    assert (layers, full) == (len(beside_zero), sum(part > 1 - 1e-6 for part in beside_zero))


def test_rounding():
    assert is_rounded("-0.0017", -0.00172) and not is_rounded("-0.0017", -0.00178)
    assert is_rounded("2e-5", 1.6e-5) and not is_rounded("2e-5", 1.4e-5)
    assert is_rounded("8", 8) and not is_rounded("8", 7)
