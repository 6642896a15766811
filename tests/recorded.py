"The runs recorded from Composer (`composer.json`), and `replay` of one."
import json
from pathlib import Path

import torch

from optimizers_explained.problems import max_diff

RUNS = json.loads((Path(__file__).parent/'composer.json').read_text())['cases']


def tensors(values, shapes):
    pairs = zip(values, shapes)
    return [torch.tensor(x, dtype=torch.float64).reshape(s) for x, s in pairs]


def replay(run, make, **changed):
    """Largest difference from the recorded parameters, over all steps, of
    `make(params or groups, **hypers)` with the recorded hypers, some `changed`."""
    ps = [p.requires_grad_() for p in tensors(run['params'], run['shapes'])]
    params = ps
    if run['groups']: params = [{'params': [p], **g} for p, g in zip(ps, run['groups'])]
    opt = make(params, **{**run['kwargs'], **changed})
    lrs = [g['lr'] for g in opt.param_groups]
    diffs = []
    for t, (grads, expected) in enumerate(zip(run['grads'], run['expected'])):
        if run['lr_factors']:
            for g, lr in zip(opt.param_groups, lrs): g['lr'] = lr*run['lr_factors'][t]
        for i, (p, g) in enumerate(zip(ps, tensors(grads, run['shapes']))):
            p.grad = None if [t, i] in run['missing_grads'] else g
        opt.step()
        diffs.append(max_diff(ps, tensors(expected, run['shapes'])))
    return max(diffs)
