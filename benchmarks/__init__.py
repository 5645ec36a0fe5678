"""Measurements: what LS-LoRA gains and costs. Each module says how to run it; LOG.md says what was tried."""
