"""fastai's design, rebuilt: steppers, the `Optimizer` that runs them, and `OptimWrapper`.

- `optimizers_explained.callback.steppers`: the small functions, and optimizers made of them.
- `optimizers_explained.callback.optimizer`: fastai's `Optimizer`, method by method.
- `optimizers_explained.callback.wrapper`: the same methods around torch's optimizers."""
from .optimizer import *
from .steppers import *
from .wrapper import *
