"""What several test files share."""

import os

# No test may wait for a hub; set before any library reads it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

# The Triton kernels are interpreted where there is no GPU. Whoever imports triton first decides, so it is set here.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder with a small random `model` and rows for it, `train.jsonl`."""
    from tests.tiny import make_tiny

    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2():
    """Folder of the embedded model, in the user's cache: fetched on the first run."""
    from lslora.embedded import embedded_model

    return embedded_model()
