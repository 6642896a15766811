"""Optimizers for neural networks, explained line by line and run side by side: SGD, DecoupledSGDW and fastai's callback Optimizer

Modules:

- `optimizers_explained.basic`: What one update changes, what a training loop adds, and a small SGD worth keeping.
- `optimizers_explained.problems`: Four small problems on which an optimizer shows what it does, and the tables and plots every page uses."""

__version__ = "0.0.1"
