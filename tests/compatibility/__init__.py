"""What a user of peft's LoRA does, done with LS-LoRA: each operation works or refuses with a message.

`python -m tests.compatibility` runs all of them and writes `docs/compatibility.md`;
`tests/test_compatibility.py` holds that page against new runs.
"""
