"""Adapters by coverage: atheris looks for bytes that load as something else than they say, or end in another error.

python -m tests.torture.fuzz_adapters tests/torture/corpus/adapters -max_total_time=60

An input is the config's length in four bytes, the config, and the weights. `--write` makes the committed corpus anew.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["lslora.config", "lslora.config_file", "lslora.adapter_files", "lslora.guards"]
):
    from .folders import legal, outcome, pack, settings, unpack, write

CORPUS = Path(__file__).parent / "corpus" / "adapters"
PLACE = tempfile.TemporaryDirectory()


def test_one(data: bytes) -> None:
    """Load the adapter; whatever is neither loaded as it says nor refused comes through as an error."""
    length = int.from_bytes(data[:4], "little")
    folder = Path(PLACE.name, "adapter")
    write(folder, data[4 : 4 + length], data[4 + length :])
    outcome(folder)


def joined(config: bytes, weights: bytes) -> bytes:
    return len(config).to_bytes(4, "little") + config + weights


def corpus() -> dict[str, bytes]:
    """A legal adapter, small ones that lack something, and what a config may hold besides."""
    _, weights = legal()
    header, body = unpack(weights)
    needed = {"peft_type": "LSLORA", "r": 2, "target_modules": ["0", "1"], "calibration_steps": 1}
    small = json.dumps(needed).encode()
    more = {**needed, "rank_pattern": {"0": 2}, "alpha_pattern": {"1": 1.5}, "k_min": -1, "num_knots": 5}
    return {
        "legal": joined(json.dumps(settings()).encode(), weights),
        "small": joined(small, weights),
        "patterns": joined(json.dumps(more).encode(), weights),
        "other_method": joined(json.dumps({**needed, "peft_type": "LORA"}).encode(), weights),
        "no_tensors": joined(small, pack({}, b"")),
        "short": joined(small, pack(header, body[:-4])),
        "no_header": joined(small, b""),
        "deep": joined(b"[" * 500 + b"]" * 500, weights),
        "empty": b"",
    }


def main(argv: list[str]) -> int:
    if "--write" in argv:
        CORPUS.mkdir(parents=True, exist_ok=True)
        for name, data in corpus().items():
            (CORPUS / name).write_bytes(data)
        return 0
    # What is found goes to a folder of its own, the committed ones stay as they are.
    folders = [part for part in argv if not part.startswith("-")]
    options = [part for part in argv if part.startswith("-")]
    found = tempfile.mkdtemp(prefix="found_adapters_")
    atheris.Setup(
        [sys.argv[0], f"-artifact_prefix={found}{os.sep}", "-max_len=8192", *options, found, *folders], test_one
    )
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
