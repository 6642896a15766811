"""Recipes translated between torch, Composer, fastai, timm and optimi.

- `optimizers_explained.translate.recipes`: what each optimizer takes.
- `optimizers_explained.translate.rules`: one common form, and what a destination lacks.
- `optimizers_explained.translate.rosetta`: `translate`, and the command `oe-translate`."""
from .rosetta import *
