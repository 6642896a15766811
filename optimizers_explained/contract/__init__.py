"""What any torch optimizer promises, run on any optimizer.

- `optimizers_explained.contract.workbench`: what a promise is tried with.
- `optimizers_explained.contract.tensors`: promises about kinds of tensors.
- `optimizers_explained.contract.training`: promises about a training loop.
- `optimizers_explained.contract.table`: the others, and `contract`, which runs all."""
from .table import *
