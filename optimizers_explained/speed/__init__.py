"""What `foreach=True` and `fused=True` mean: the same steps on lists, and in kernels.

- `optimizers_explained.speed.dispatch`: which parameters run where; what the core calls.
- `optimizers_explained.speed.lists`: the same steps on lists of tensors.
- `optimizers_explained.speed.outside`: what the code of a step reads besides its arguments.
- `optimizers_explained.speed.operations`: the operations that a kernel can hold.
- `optimizers_explained.speed.recorder`: steps run once on stand-ins that write them down.
- `optimizers_explained.speed.cpp`, `optimizers_explained.speed.triton`: what was written down, as source.
- `optimizers_explained.speed.compiler`: from source to something that can be called.
- `optimizers_explained.speed.memory`: where tensors are, asked before every step."""
