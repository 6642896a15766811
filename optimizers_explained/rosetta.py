"""Another way to `optimizers_explained.translate`: `from optimizers_explained.rosetta import translate`."""
from .translate.rosetta import *
