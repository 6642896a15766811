"""The fuzzer: new programs every time, for half a minute; and faults that are planted.

`FUZZ_SEED` repeats a run, `FUZZ_SECONDS` changes its length."""
import itertools
import multiprocessing
import os
import random
import re
from concurrent.futures import ProcessPoolExecutor

import fuzz
import pytest
import torch

from optimizers_explained.speed import operations
from optimizers_explained.speed.lists import PIECE

@pytest.fixture(scope='module')
def clean():
    """A process of its own that forks: one in which other tests have started threads
    must not, their locks may be held for ever in its children."""
    spawn = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(1, mp_context=spawn) as process: yield process

def new_programs(seed, seconds):
    "The report of programs, and the smallest text of the first that fails."
    report = fuzz.Report()
    for report in fuzz.fuzz(fuzz.programs(seed), seconds):
        if report.failures: break
    for text, failure in report.failures[:1]:
        return report, f'{failure}\n\n{fuzz.shrink(text, failure, 30)}'
    return report, ''

def test_new_programs(clean, capsys):
    seed = int(os.environ.get('FUZZ_SEED') or random.randrange(2**32))
    seconds = float(os.environ.get('FUZZ_SECONDS', 30))
    report, failure = clean.submit(new_programs, seed, seconds).result()
    with capsys.disabled(): print(f'\nFUZZ_SEED={seed}', report, sep='\n')
    if failure: pytest.fail(failure, pytrace=False)
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

def planted(kinds, pattern, new, programs=100, limit=fuzz.LIMIT):
    "What is said of the first program that a fault, put into its text, changes."
    fuzz.LIMIT = limit
    texts = itertools.islice(fuzz.programs(0, kinds), programs)
    faulty = (text._replace(plant=(pattern, new)) for text in texts)
    fuzz.warm_up()
    wrong = (outcome.failure for _, outcome in fuzz.outcomes(faulty, 2))
    return next((failure for failure in wrong if failure), '')

WHERE = '''torch.Tensor.where = lambda x, condition, other: (
    torch.where(x != 0, condition.to(x.dtype), other))
KNOB,'''
SWAP = '''opt.step()
            for s in opt.state.values(): s and s.update(m=s['v'], v=s['m'])'''
DIE = '__import__("os").kill(__import__("os").getpid(), 9)'
INSTEAD = [('add', 'sub'), ('minimum', 'maximum'), ('clamp_max', 'clamp_min'),
           ('neg', 'abs'), ('addcmul', 'addcdiv'), ('add', 'lerp'),
           ('ones_like', 'zeros_like'), ('neg', 'sign'), ('clone', 'square')]
PLANTS = dict( # kinds of programs, what is replaced, by what
    where_as_the_function=([], 'KNOB,', WHERE),
    first_flag_for_all=(['flag'], r'ps\[1\].no_decay = True|SPARED.add\(.*\)', '0'),
    first_shape_for_all=(['flag'], r'p\.(shape|size\(|numel\()',
                         r'[*SPARED][0].\1'),
    swap_lost=(['swap'], r"state\['m'\], state\['v'\] =", '_ ='),
    columns_swapped=([], r'opt\.step\(\)', SWAP),
    late_state_lost=(['late'], r"state\['late'\] = \w", '_ = g'),
    false_dropped=(['odd_number'], r'(value|alpha)=(False|0)\b', r'\1=1'),
    nan_bound=(['odd_number'], r'clamp\((.*)nan', r'clamp(\1inf'),
    nan_number=(['odd_number'], r'math.isfinite\(a\)', f'(math.isfinite(a) or {DIE})'),
    frozen_draws=(['random'], r'random\.random\(\) <', '1 >'),
    frozen_by_luck=(['random'], r'torch\.rand\(\(\)\)', '0.1'),
    greater_for_less=([], ' <= ', ' > '),
    float_for_int=([], r"state\['t'\] \+= 1", "state['t'] += 1."),
    skipped_is_stepped=(['skip'], r'\.grad = None\n', '.grad.zero_()\n'),
    hangs=([], r'opt\.step\(\)', 'while t == 1: pass'),
    **{f'{a}_for_{b}': ([], rf'\b{b}(_?)\(', rf'{a}\1(') for a, b in INSTEAD})

@pytest.mark.parametrize('name', PLANTS)
def test_what_is_planted_is_found(name, clean):
    limit = 3 if name == 'hangs' else fuzz.LIMIT
    says = dict(hangs='hangs', nan_number='died').get(name, 'plant')
    said = clean.submit(planted, *PLANTS[name], limit=limit).result()
    assert said.startswith(says)

def test_nothing_is_found_where_nothing_is_planted(clean):
    kinds = ['flag', 'swap', 'skip', 'late']
    said = clean.submit(planted, kinds, 'KNOB', 'KNOB', programs=20).result()
    assert said == ''

def shrunk(text):
    "The smaller text of a program that fails."
    fuzz.warm_up()
    (_, outcome), = fuzz.outcomes([text])
    return fuzz.shrink(text, outcome.failure, 8)

def test_a_failure_is_shrunk(clean):
    plant = r"state\['t'\] \+= 1", 'pass'
    text = next(fuzz.programs(3, ['late']))._replace(plant=plant)
    small = clean.submit(shrunk, text).result()
    assert len(small.body) < len(text.body)/2 and "state['t'] += 1" in small.body

def test_large_tensors_do_not_hang_after_other_tests_have_used_threads(clean):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.ones(10_000_000).sum()
    torch.set_num_threads(threads)
    said = clean.submit(planted, ['large'], 'KNOB', 'KNOB', programs=2).result()
    assert said == ''
