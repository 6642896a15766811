"""The fuzzer: new programs every time, for half a minute; and what it finds if it is planted.

`FUZZ_SEED` repeats a run, `FUZZ_SECONDS` changes its length."""
import itertools
import os
import random
import re

import fuzz
import pytest
import torch

from optimizers_explained import operations
from optimizers_explained.multi_tensor import PIECE

def test_new_programs(capsys):
    seed = int(os.environ.get('FUZZ_SEED') or random.randrange(2**32))
    seconds, report = float(os.environ.get('FUZZ_SECONDS', 30)), fuzz.Report()
    for report in fuzz.fuzz(fuzz.programs(seed), seconds):
        if report.failures: break
    with capsys.disabled(): print(f'\nFUZZ_SEED={seed}', report, sep='\n')
    for text, failure in report.failures[:1]:
        small = fuzz.shrink(text, failure, 30)
        pytest.fail(f'FUZZ_SEED={text.seed}: {failure}\n\n{small}', pytrace=False)
    assert report.kernels > 2 and report.blind() == []

def test_every_operation_is_written_in_every_form():
    programs = itertools.islice(fuzz.programs(0), 4000)
    texts = '\n'.join(text.body.replace('linalg.', 'linalg_') for text in programs)
    calls = set(re.findall(r'(?:torch)?\.[a-z]\w*\(', texts))
    tables = 'OPS', 'LOGICAL', 'SUMS', 'SAME'
    known = {name for table in tables for name in vars(operations).get(table, {})}
    for name in [name.removeprefix('Tensor.') for name in known]:
        methods = [m for m in (name, f'{name}_') if hasattr(torch.Tensor, m)]
        forms = [f'.{method}(' for method in methods]
        if hasattr(torch, name) or 'linalg' in name: forms.append(f'torch.{name}(')
        assert forms and calls.issuperset(forms), name
    assert fuzz.LARGE[0][0] >= 2*PIECE

def planted(kinds, pattern, new, programs=100):
    "What is said of the first program that a fault, put into its text, changes."
    texts = itertools.islice(fuzz.programs(0, kinds), programs)
    faulty = (text._replace(plant=(pattern, new)) for text in texts)
    fuzz.warm_up()
    wrong = (outcome.failure for _, outcome in fuzz.outcomes(faulty, 2))
    return next((failure for failure in wrong if failure), '')

WHERE = '''torch.Tensor.where = lambda x, condition, other: (
    torch.where(x != 0, condition.to(x.dtype), other))
KNOB,'''
SWAP = "opt.step(); [s.update(m=s['v'], v=s['m']) for s in opt.state.values() if 'v' in s]"
DIE = '__import__("os").kill(__import__("os").getpid(), 9)'
INSTEAD = [('add', 'sub'), ('minimum', 'maximum'), ('clamp_max', 'clamp_min'),
           ('neg', 'abs'), ('addcmul', 'addcdiv'), ('gt', 'lt'), ('sum', 'mean'),
           ('ones_like', 'zeros_like'), ('add', 'lerp'), ('logical_or', 'logical_and'),
           ('neg', 'sign'), ('clone', 'square')]
PLANTS = dict( # kinds of programs, what is replaced, by what
    where_as_the_function=([], 'KNOB,', WHERE),
    first_flag_for_all=(['flag'], r'ps\[1\].no_decay = True|SPARED.add\(ps\[1\]\)', '0'),
    first_shape_for_all=(['flag'], r'p\.(shape|size\(\)|numel\(\))', r'p.new_ones(9).\1'),
    swap_lost=(['swap'], r"state\['m'\], state\['v'\] =", '_ ='),
    columns_swapped=([], r'opt\.step\(\)', SWAP),
    late_state_lost=(['late'], r"state\['late'\] = \w", '_ = g'),
    false_dropped=(['odd_number'], r'(value|alpha)=(False|0)\b', r'\1=1'),
    nan_number=(['odd_number'], r'math.isfinite\((\w)\)', rf'(\1 == \1 or {DIE})'),
    frozen_draws=(['random'], r'random\.random\(\) <', '1 >'),
    frozen_by_luck=(['random'], r'torch\.rand\(\(\)\)', '0.1'),
    float_for_int=([], r"state\['t'\] \+= 1", "state['t'] += 1."),
    skipped_is_stepped=(['skip'], r'\.grad = None\n', '.grad.zero_()\n'),
    hangs=([], r'opt\.step\(\)', 'while t == 1: pass'),
    **{f'{a}_for_{b}': ([], rf'\b{b}(_?)\(', rf'{a}\1(') for a, b in INSTEAD})

@pytest.mark.parametrize('name', PLANTS)
def test_what_is_planted_is_found(name, monkeypatch):
    monkeypatch.setattr(fuzz, 'LIMIT', 3 if name == 'hangs' else 60)
    says = dict(hangs='hangs', nan_number='died').get(name, 'plant')
    assert planted(*PLANTS[name]).startswith(says)

def test_nothing_is_found_where_nothing_is_planted():
    kinds = ['flag', 'swap', 'skip', 'late']
    assert planted(kinds, 'KNOB', 'KNOB', programs=20) == ''

def test_a_failure_is_shrunk():
    fuzz.warm_up()
    plant = r"state\['t'\] \+= 1", 'pass'
    text = next(fuzz.programs(3, ['late']))._replace(plant=plant)
    (_, outcome), = fuzz.outcomes([text])
    small = fuzz.shrink(text, outcome.failure, 8)
    assert len(small.body) < len(text.body)/2 and "state['t'] += 1" in small.body
