"""The annotations, as a type checker sees them: for every optimizer and each of its
arguments, correct user code passes and wrong user code is reported, line by line."""
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import optimizers_explained as pkg
from optimizers_explained import optim

pytest.importorskip('mypy', reason='mypy is not installed: no annotation is checked')

RIGHT = dict(
    lr=['0.1', '1', 'torch.tensor(0.1)'],
    betas=['(0.9, 0.99)', '[0.9, 0.99]', '(torch.tensor(0.9), 0.99)'],
    lr0=['0.3', 'None'], foreach=['None', 'True'], fused=['None', 'True'],
    nesterov=['True'], maximize=['True'], amsgrad=['True'], debug=['True'])
WRONG = dict(
    lr=["'a'", 'None'], betas=['0.9', "'ab'", 'None'], lr0=["'a'"],
    foreach=["'x'", '2.5'], fused=["'x'"], nesterov=['1.5', "'yes'"],
    maximize=["'yes'"], amsgrad=['None'], debug=["'yes'"])
NUMBERS = 'momentum dampening weight_decay eps trust_coeff'.split()
for number in NUMBERS: RIGHT[number], WRONG[number] = ['0.5', '0'], ["'a'", 'None']

PREFACE = '''
from typing import Any
import torch
from torch import Tensor
from torch.optim import lr_scheduler
from optimizers_explained import optim
from optimizers_explained.core import Params, StepOptimizer
from optimizers_explained.steps import momentum, sgd

model = torch.nn.Linear(2, 1)
ps = list(model.parameters())
'''

CORRECT = '''
groups: list[dict[str, Any]] = [{'params': [ps[0]]}, {'params': [ps[1]], 'lr': 0.01}]
opt = optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
opt = optim.SGD(groups, 0.1, 0.9)
opt = optim.SGD([{'params': [ps[0]]}, {'params': ps[1:], 'lr': 0.01, 'name': 'bias'}])
opt = optim.SGD(model.parameters(), fused=True)
anything: torch.optim.optimizer.ParamsT = ps
optim.SGD(anything)
scheduler = lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10)
averaged = torch.optim.swa_utils.SWALR(opt, swa_lr=0.05)
opt.add_param_group({'params': [torch.nn.Parameter(torch.ones(2))], 'lr': 0.01})
opt.load_state_dict(opt.state_dict())
opt.zero_grad()
scaler = torch.amp.GradScaler('cpu')
scaler.step(opt)
lr: float = opt.param_groups[0]['lr']

def closure() -> Tensor:
    loss: Tensor = model(torch.ones(2)).sum()
    loss.backward()
    return loss

loss: Tensor = opt.step(closure)
number: float = opt.step(lambda: 0.5)
nothing: None = opt.step()
torchs: torch.optim.Optimizer = opt
steps: StepOptimizer = opt
makes: type[torch.optim.Optimizer] = optim.AdamW

def clip(p: Tensor, g: Tensor, state: dict, *, largest: float = 1.) -> Tensor:
    return g.clamp(-largest, largest)

own = StepOptimizer(ps, [clip, momentum, sgd], lr=0.1, largest=0.5, foreach=True)

class Clipped(StepOptimizer):
    def __init__(self, params: Params, lr: float = 1e-3) -> None:
        super().__init__(params, [clip, sgd], lr=lr)

class Mine(optim.AdamW):
    pass

Clipped(ps, lr=0.1).step()
Mine(ps, lr=0.1).step()
'''

MISTAKES = '''
opt = optim.SGD(ps)
optim.AdamW(3)
optim.SGD(ps, 0.1, 'a')
opt.step(3)
opt.step('closure')
text: str = opt.step(lambda: 0.5)
StepOptimizer(ps, 3, lr=0.1)
StepOptimizer(ps, [sgd], lr=0.1, fused='x')
opt.add_param_group(3)
'''


def arguments(name): return list(inspect.signature(getattr(optim, name)).parameters)[1:]


def required(name, but=None):
    "What the optimizer cannot do without, as the text of arguments."
    text = ''
    for k, p in inspect.signature(getattr(optim, name)).parameters.items():
        if p.default is p.empty and k not in ('params', but): text += f', {k}=0.1'
    return text


def calls(values):
    "A line for every argument of every optimizer and every value of it."
    for name in optim.__all__:
        for k in arguments(name):
            others = required(name, but=k)
            for value in values[k]: yield f'optim.{name}(ps{others}, {k}={value})'


def forgotten():
    "Lines with a name that an optimizer does not have, or without one that it needs."
    for name in optim.__all__:
        needs = required(name)
        yield f'optim.{name}(ps{needs}, momentun=0.9)'
        if needs: yield f'optim.{name}(ps)'


@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('mypy')


def check(code, cache):
    "The numbers of the lines that mypy reports, and all that it says."
    file = cache/'user_code.py'
    file.write_text(code)
    env = {**os.environ, 'MYPYPATH': str(Path(pkg.__path__[0]).parent)}
    done = subprocess.run(
        [sys.executable, '-m', 'mypy', '--config-file=', '--follow-imports=silent',
         '--check-untyped-defs', f'--cache-dir={cache}/cache', file.name],
        cwd=cache, env=env, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode in (0, 1), said
    found = re.findall(r'^user_code\.py:(\d+): error', said, re.M)
    return set(map(int, found)), said


def test_correct_code_passes(cache):
    wrong, said = check(PREFACE + CORRECT + '\n'.join(calls(RIGHT)), cache)
    assert not wrong, said


def test_wrong_code_is_reported(cache):
    good = PREFACE.splitlines()
    bad = [o for o in MISTAKES.splitlines() if o] + [*calls(WRONG), *forgotten()]
    found, said = check('\n'.join(good + bad), cache)
    lines = dict(enumerate(good + bad, 1))
    expected = {i for i in lines if i > len(good) and lines[i] != 'opt = optim.SGD(ps)'}
    assert len(expected) > 100
    assert not expected - found, [lines[i] for i in sorted(expected - found)]
    assert not found - expected, said


def test_every_argument_has_right_and_wrong_values():
    names = set()
    for name in optim.__all__: names.update(arguments(name))
    assert names == set(RIGHT) == set(WRONG)


def test_the_package_says_that_it_is_typed(root):
    assert (Path(pkg.__path__[0])/'py.typed').is_file()
    assert '"py.typed"' in (root/'pyproject.toml').read_text()
    assert 'py.typed' in (root/'MANIFEST.in').read_text()
