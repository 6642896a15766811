"""Optimizers for neural networks, explained line by line and run side by side: SGD, DecoupledSGDW and fastai's callback Optimizer

Modules:

- `optimizers_explained.adam`: Two averages, one division, and a small number whose place decides more than its size.
- `optimizers_explained.basic`: What one update changes, what a training loop adds, and a small SGD worth keeping.
- `optimizers_explained.bench`: How long does one step take? Ours, torch's and five other libraries, side by side in one process, with the memory a step asks for and what it costs to start.
- `optimizers_explained.bookkeeping`: fastai's `Optimizer`, method by method: groups, hyperparameters, state, saving, freezing.
- `optimizers_explained.build`: From source to something that can be called: compiled once, kept in a private folder, and called with addresses.
- `optimizers_explained.callback`: fastai's design, rebuilt: the optimizer keeps the books, and a list of small functions does the work.
- `optimizers_explained.checkpoint`: What an optimizer saves, what goes wrong when it is loaded, and how to move between libraries without losing the momentum.
- `optimizers_explained.checks`: What an optimizer refuses, wherever it can before anything has changed, and how it says so.
- `optimizers_explained.command`: What the commands of this package have in common: options from a signature, errors in one line, files that are whole or not there.
- `optimizers_explained.comparison`: Contenders and stopwatch together: everybody steps in turn, and every number is set beside torch's fused step.
- `optimizers_explained.composer`: MosaicML Composer's two optimizers, rebuilt line by line, with the same numbers and five repairs.
- `optimizers_explained.contenders`: One list of contenders for the benchmark: what each library calls the optimizer, and how it wants to be told the same thing.
- `optimizers_explained.contract`: What must any torch optimizer do that nobody writes down?
- `optimizers_explained.core`: An optimizer written as a list of tiny functions that is still a real `torch.optim.Optimizer`.
- `optimizers_explained.fused`: Which parameters run in a kernel, which in Python, and how a reader is told.
- `optimizers_explained.groups`: Parameter groups on a real ResNet and a real ViT: weight decay, layer decay, discriminative rates, freezing, and timm's factory building our optimizers.
- `optimizers_explained.judge`: A falling loss proves little. What does, in functions of a few lines.
- `optimizers_explained.kernels`: A recording becomes C++ source: a loop that fetches an element, does everything to it, and stores it.
- `optimizers_explained.kinds`: Half precision, complex numbers, sparse gradients, odd layouts: trained like any other, or refused in words.
- `optimizers_explained.layout`: What a kernel must know of every tensor before every step, and how a whole list is asked at once.
- `optimizers_explained.manners`: What a training loop expects of `step()`: gradients, groups, schedulers, scalers.
- `optimizers_explained.multi_tensor`: The same steps on one tensor, on a list of tensors, or in one kernel made from them.
- `optimizers_explained.operations`: What a step computes with, written down: numbers as Python source, operations as expressions.
- `optimizers_explained.optim`: `from optimizers_explained import optim`: torch's names, argument names, order and defaults.
- `optimizers_explained.outside`: A step gets a parameter, a gradient, a state and some numbers. Its code may look at more, and what that is decides how it can be run.
- `optimizers_explained.problems`: Four small problems on which an optimizer shows what it does, and the tables and plots every page uses.
- `optimizers_explained.race`: Four optimizers, one network, one set of batches: with the right translation they end at the same weights.
- `optimizers_explained.recipes`: What `weight_decay` means in each of twenty optimizers, every argument with its default, and what is refused.
- `optimizers_explained.recorder`: Steps run once on stand-ins that write down what is done to them.
- `optimizers_explained.rosetta`: Recipes translated between torch, Composer, fastai, timm and optimi, and every entry of the table run on both sides.
- `optimizers_explained.rules`: One common form for twenty optimizers, and a rule for each thing that a destination may lack.
- `optimizers_explained.stopwatch`: Alternate, take medians, count bytes: the instruments of the benchmark, each tried on a case with a known answer.
- `optimizers_explained.triton_kernels`: The recording that became C++ becomes Triton source for a GPU: a program for every block of every tensor.
- `optimizers_explained.trust`: A step is measured against the weights that it changes. Then the size of the gradient cancels, and a weight of 0 becomes a special case.
- `optimizers_explained.wrapper`: fastai's names, slices and freezing for any torch optimizer, which goes on doing its own arithmetic."""

__version__ = "0.0.1"
