"""LS-LoRA: LoRA whose update passes through one small learnable spline per layer, for Hugging Face peft.

Importing this package registers the method with peft, and the checks of its adapters' files, in memory; that is its
only side effect.
"""

from importlib.metadata import version

from . import registry

registry.register()

from .config import LSLoraConfig  # noqa: E402
from .layer import LSLoraLayer  # noqa: E402
from .model import LSLoraModel  # noqa: E402
from .spline import Spline, spline_penalty  # noqa: E402

__version__ = version("lslora")
__all__ = ["LSLoraConfig", "LSLoraLayer", "LSLoraModel", "Spline", "spline_penalty"]
