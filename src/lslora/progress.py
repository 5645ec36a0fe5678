"""When progress bars and the libraries' own words are shown, and that a terminal takes all text."""

from __future__ import annotations

import io
import sys
import warnings

from transformers.utils import logging


def bars_hidden(quiet: bool) -> bool:
    """Whether to show no progress bars: when told to be quiet, or where the error output is no terminal."""
    return quiet or not sys.stderr.isatty()


def print_any_text() -> None:
    """Names that the output has no characters for are written as escapes, where `print` would raise."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def hide_library_warnings() -> None:
    """Nothing of what libraries tell those who write programs with them, not those who run one."""
    for kind in (DeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", kind)


def hide_library_bars() -> None:
    """No bars of transformers and, where it is installed, of datasets."""
    logging.disable_progress_bar()
    try:
        import datasets
    except ImportError:
        return
    datasets.disable_progress_bars()
