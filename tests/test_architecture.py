"""Imports run one way: `__init__ → registry → guards → model → layer → placement → spline → … → reference`."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "lslora"

# Every module and the modules of the package it may import (at the top or inside a function).
ALLOWED = {
    "__init__": {"registry", "config", "layer", "model", "spline"},
    "registry": {"config", "guards", "model"},
    "guards": {"adapter_files", "config", "config_file", "model"},
    "adapter_files": set(),
    "config_file": set(),
    "model": {"config", "config_file", "layer", "placement"},
    "layer": {"config", "placement"},
    "placement": {"config", "spline"},
    "fp32": set(),
    "grid": {"calibration", "config", "fp32"},
    "spline": {"config", "grid", "penalty", "ops.linear", "ops.spline", "ops.update"},
    "calibration": {"grid"},  # whose scale it finds, for type checkers only
    "penalty": {"spline"},  # whose heights it holds back, for type checkers only
    "ops.__init__": set(),
    "ops.linear": {"ops.once", "ops.spline", "ops.update"},
    "ops.update": {"ops.cpu", "ops.cpu_update", "ops.once", "ops.spline", "ops.triton_update"},
    "ops.cpu_update": {"ops.cpu", "ops.reference"},
    "ops.triton_update": {"ops.launch", "ops.reference", "ops.tracing", "ops.triton"},
    "ops.spline": {"ops.cpu", "ops.eager", "ops.once", "ops.reference", "ops.tracing", "ops.triton"},
    "ops.triton": {"ops.launch", "ops.reference", "ops.tracing"},
    "ops.launch": set(),
    "ops.cpu": {"ops.reference", "ops.tracing"},
    "ops.eager": {"ops.reference"},
    "ops.reference": set(),
    "ops.once": set(),
    "ops.tracing": set(),
    "config": {"config_file", "ops.spline"},
    "json_rows": set(),
    "answers": set(),
    "data": {"answers", "json_rows"},
    "scoring": set(),
    "partial_results": {"files", "scoring"},
    "prompts": {"data"},
    "lengths": {"data", "prompts"},
    "likelihood": {"answers", "data", "prompts"},
    "base_model": {"embedded", "lengths"},
    "embedded": {"files"},
    "files": set(),
    "checkpoints": {"files"},
    "interruption": set(),
    "order": set(),
    "failures": {"diagnostics", "records", "spline"},
    "diagnostics": {"records", "spline"},
    "records": {"files"},
    "plots": {"records"},
    "trackers": set(),
    "callback": {"diagnostics", "failures", "files", "plots", "records", "trackers"},
    "progress": set(),
    "run_folder": {"checkpoints", "files"},
    "report": {"callback", "checkpoints", "files", "plots", "records", "run_folder", "scoring"},
    "training": {"calibration", "diagnostics", "failures", "layer", "spline"},
    "evaluation": {"answers", "data", "lengths", "likelihood", "prompts", "scoring"},
    "card": {"embedded", "scoring"},
    "lm_eval": {"answers", "data", "evaluation", "files"},
    "export": {"config", "files", "layer", "placement"},
}


def imports(path):
    """Modules of the package that a file imports, as dotted names relative to the package."""
    folder = ["lslora", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            names = [f"{module}.{alias.name}" if node.module is None else module for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("lslora.") for name in names if name.startswith("lslora."))


def test_imports_run_one_way():
    found = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): set(imports(p)) for p in PACKAGE.rglob("*.py")}
    assert found.keys() == ALLOWED.keys()
    for module, names in found.items():
        assert names <= ALLOWED[module], f"{module} imports {sorted(names - ALLOWED[module])}"


def test_the_operation_knows_no_config_and_no_module():
    for path in (PACKAGE / "ops").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "nn.Module" not in text and "peft" not in text, path.name
