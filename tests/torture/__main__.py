"""`python -m tests.torture NAME`, with NAME one of the programs of this folder."""

import importlib
import sys

PROGRAMS = ("adapters", "data", "disk", "kill", "memory")

if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name not in PROGRAMS:
        sys.exit(f"usage: python -m tests.torture {{{','.join(PROGRAMS)}}} ...; got {name}")
    sys.exit(importlib.import_module(f"tests.torture.{name}").main(sys.argv[2:]))
