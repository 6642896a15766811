"""How long does one step take? Ours, torch's and other libraries, side by side.

- `optimizers_explained.bench.contenders`: who takes part, told the same thing.
- `optimizers_explained.bench.stopwatch`: how it is measured.
- `optimizers_explained.bench.comparison`: everybody steps in turn.
- `optimizers_explained.bench.report`: the tables, and the command `oe-bench`."""
from .report import *
