"""Optimizers for neural networks, explained line by line and run side by side: SGD, DecoupledSGDW and fastai's callback Optimizer

Modules:

- `optimizers_explained.basic`: What one update changes, what a training loop adds, and a small SGD worth keeping.
- `optimizers_explained.bench.comparison`: Contenders and stopwatch together: everybody steps in turn, and every number is set beside torch's fused step.
- `optimizers_explained.bench.contenders`: One list of contenders for the benchmark: what each library calls the optimizer, and how it wants to be told the same thing.
- `optimizers_explained.bench.report`: How long does one step take? Ours, torch's and five other libraries, side by side in one process, with the memory a step asks for and what it costs to start.
- `optimizers_explained.bench.stopwatch`: Alternate, take medians, count bytes: the instruments of the benchmark, each tried on a case with a known answer.
- `optimizers_explained.callback.optimizer`: fastai's `Optimizer`, method by method: groups, hyperparameters, state, saving, freezing.
- `optimizers_explained.callback.steppers`: fastai's design, rebuilt: the optimizer keeps the books, and a list of small functions does the work.
- `optimizers_explained.callback.wrapper`: fastai's names, slices and freezing for any torch optimizer, which goes on doing its own arithmetic.
- `optimizers_explained.checkpoint`: What an optimizer saves, what goes wrong when it is loaded, and how to move between libraries without losing the momentum.
- `optimizers_explained.checks`: What an optimizer refuses, wherever it can before anything has changed, and how it says so.
- `optimizers_explained.commands`: What the commands of this package have in common: options from a signature, errors in one line, files that are whole or not there.
- `optimizers_explained.composer`: MosaicML Composer's two optimizers, rebuilt line by line, with the same numbers and five repairs.
- `optimizers_explained.contract.table`: What must any torch optimizer do that nobody writes down?
- `optimizers_explained.contract.tensors`: Half precision, complex numbers, sparse gradients, odd layouts: trained like any other, or refused in words.
- `optimizers_explained.contract.training`: What a training loop expects of `step()`: gradients, groups, schedulers, scalers.
- `optimizers_explained.contract.workbench`: A falling loss proves little. What does, in functions of a few lines.
- `optimizers_explained.core`: An optimizer written as a list of tiny functions that is still a real `torch.optim.Optimizer`.
- `optimizers_explained.groups`: Parameter groups on a real ResNet and a real ViT: weight decay, layer decay, discriminative rates, freezing, and timm's factory building our optimizers.
- `optimizers_explained.optim`: `from optimizers_explained import optim`: torch's names, argument names, order and defaults.
- `optimizers_explained.problems`: Four small problems on which an optimizer shows what it does, and the tables and plots every page uses.
- `optimizers_explained.race`: Four optimizers, one network, one set of batches: with the right translation they end at the same weights.
- `optimizers_explained.speed.compiler`: From source to something that can be called: compiled once, kept in a private folder, and called with addresses.
- `optimizers_explained.speed.cpp`: A recording becomes C++ source: a loop that fetches an element, does everything to it, and stores it.
- `optimizers_explained.speed.dispatch`: Which parameters run in a kernel, which in Python, and how a reader is told.
- `optimizers_explained.speed.lists`: The same steps on one tensor, on a list of tensors, or in one kernel made from them.
- `optimizers_explained.speed.memory`: What a kernel must know of every tensor before every step, and how a whole list is asked at once.
- `optimizers_explained.speed.operations`: What a step computes with, written down: numbers as Python source, operations as expressions.
- `optimizers_explained.speed.outside`: A step gets a parameter, a gradient, a state and some numbers. Its code may look at more, and what that is decides how it can be run.
- `optimizers_explained.speed.recorder`: Steps run once on stand-ins that write down what is done to them.
- `optimizers_explained.speed.triton`: The recording that became C++ becomes Triton source for a GPU: a program for every block of every tensor.
- `optimizers_explained.steps`: Every step of this package: its formula, its few lines, and what it does to one number.
- `optimizers_explained.translate.recipes`: What `weight_decay` means in each of twenty optimizers, every argument with its default, and what is refused.
- `optimizers_explained.translate.rosetta`: Recipes translated between torch, Composer, fastai, timm and optimi, and every entry of the table run on both sides.
- `optimizers_explained.translate.rules`: One common form for twenty optimizers, and a rule for each thing that a destination may lack."""

__version__ = "0.0.1"
