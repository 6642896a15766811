"""Another way to `optimizers_explained.callback.wrapper`: `from optimizers_explained.wrapper import OptimWrapper`."""
from .callback.wrapper import *
