"""When progress bars are shown."""

from __future__ import annotations

import sys

from transformers.utils import logging


def bars_hidden(quiet: bool) -> bool:
    """Whether to show no progress bars: when told to be quiet, or where the error output is no terminal."""
    return quiet or not sys.stderr.isatty()


def hide_library_bars() -> None:
    """No bars of transformers and, where it is installed, of datasets."""
    logging.disable_progress_bar()
    try:
        import datasets
    except ImportError:
        return
    datasets.disable_progress_bars()
