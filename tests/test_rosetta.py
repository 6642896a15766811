"""Every entry of the table, run on both sides: all ordered pairs, many recipes, three
schedules; Composer's recorded numbers; the command.

A library that is not installed is skipped by name. One that changes its numbers or its
defaults fails here, with its version and the one that the table was proven with."""
import inspect
import itertools
import json
import logging
import math
import random
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from optimizers_explained.translate import rosetta
from optimizers_explained.problems import max_diff
from optimizers_explained.translate.recipes import installed
from optimizers_explained.rosetta import arguments, canonical, constructor, copied
from optimizers_explained.rosetta import follow, optimizers, schedules, set_lr
from optimizers_explained.rosetta import translate


@pytest.fixture(autouse=True)
def no_advice():
    """The recipes are translated, so Composer's advice on large decays is not needed
    here; other tests want to see it."""
    log = logging.getLogger('optimizers_explained.composer')
    level = log.level
    log.setLevel('ERROR')
    yield
    log.setLevel(level)


pytestmark = [
    pytest.mark.filterwarnings('ignore:You are using weight_decay'),     # optimi's
    pytest.mark.filterwarnings('ignore:.torch.jit.script')]     # torch's, in fastai
CASES = json.loads((Path(__file__).parent/'composer.json').read_text())['cases']
PROVEN = {'torch': '2.15.0', 'timm': '1.0.31', 'fastai': '2.8.12',
          'torch-optimi': '0.3.3'}
DISTRIBUTION = dict(
    torch='torch', timm='timm', fastai='fastai', optimi='torch-optimi',
    composer='optimizers_explained', optim='optimizers_explained')
PAIRS = list(itertools.permutations(optimizers, 2))


def distribution(name): return DISTRIBUTION[name.split('.')[0]]


def needs(*names):
    for name in names:
        if installed(name): continue
        pytest.skip(f'{distribution(name)} is not installed: {name} is not compared')


def using(*names):
    "The libraries of a comparison, with their versions and the proven ones."
    texts = []
    for d in dict.fromkeys(['torch', *map(distribution, names)]):
        proven = PROVEN.get(d, 'this version')
        texts.append(f'{d} {version(d)} (proven with {proven})')
    return ', '.join(texts)


@cache
def run(name, args, schedule): return follow(name, dict(args), schedule, steps=20)


def apart(src, hypers, dst, args):
    "The largest difference over a run, for each schedule."
    diffs = {}
    for s in schedules:
        path = run(src, tuple(sorted(hypers.items())), s)
        diffs[s] = max_diff(path, run(dst, tuple(sorted(args.items())), s))
    return diffs


# ---- recipes

SGDS = [
    dict(), dict(mom=.9), dict(wd=.1),
    dict(mom=.9, wd=.02), dict(mom=.9, wd=.2), dict(mom=.6, wd=.2)]
OTHERS = [
    dict(), dict(wd=0.), dict(wd=.2), dict(b=(.8, .95), eps=1e-3),
    dict(b=(.8, .95), eps=1e-3, wd=.2), dict(b=(0., .95), wd=0.),
    dict(b=(0., .95), wd=.2)]
DAMPED = [dict(dampening=.5), dict(dampening=.9), dict(nesterov=True)]
OPTIMI = []
for start in (dict(dampening=False, torch_init=False),
              dict(dampening=True, torch_init=False),
              dict(dampening=True, torch_init=True)):
    for decay in (dict(), dict(decouple_wd=True), dict(decouple_lr=True),
                  dict(decouple_lr=True, max_lr=.2)):
        OPTIMI.append({**start, **decay})
LAMB = []
for norm in (1., None):
    for switched in (
            dict(), dict(always_adapt=True), dict(grad_averaging=False),
            dict(bias_correction=False), dict(decoupled_decay=True),
            dict(trust_clip=True), dict(decoupled_decay=True, grad_averaging=False),
            dict(decoupled_decay=True, corrected_weight_decay=True),
            dict(grad_averaging=False, always_adapt=True)):
        LAMB.append(dict(switched, max_grad_norm=norm))
SWITCHES = [
    'maximize', 'amsgrad', 'caution', 'corrected_weight_decay',
    'decoupled_weight_decay', 'decouple_wd', 'decouple_lr']


def named(name, mom=None, wd=None, b=None, **rest):
    "A recipe in the words of `name`."
    given = dict(lr=.05, momentum=mom, mom=mom, weight_decay=wd, wd=wd)
    if b: given.update(betas=b, mom=b[0], sqr_mom=b[1])
    recipe = {}
    for k, v in {**given, **rest}.items():
        if k not in optimizers[name].defaults: continue
        if v is not None or k in rest: recipe[k] = v
    return recipe


def useful(recipe):
    if recipe.get('nesterov') and not recipe.get('momentum'): return False
    # there, only a gradient of exactly zero shows it
    without_average = 'betas' in recipe and recipe['betas'][0] == 0
    return not (recipe.get('caution') and without_average)


def recipes(name):
    """Recipes of `name`: plain, momentum, decay, dampening, Nesterov, betas and eps,
    and each switch; and three at random."""
    defaults = optimizers[name].defaults
    base = SGDS if optimizers[name].family == 'sgd' else OTHERS
    extra = [dict()]
    for k in SWITCHES:
        if k in defaults: extra.append({k: not defaults[k]})
    if isinstance(defaults.get('dampening'), float): extra += DAMPED
    if 'clipping_threshold' in defaults: extra.append(dict(clipping_threshold=.5))
    more = {'optimi.SGD': OPTIMI, 'timm.Lamb': LAMB}.get(name, [])
    pairs = [*itertools.product(base, extra), *itertools.product(base[:4], more)]
    found = [named(name, **o, **e) for o, e in pairs]
    draw = random.Random(name).uniform
    for _ in range(3):
        drawn = named(name, mom=draw(0, .95), wd=draw(0, .5),
                      b=(draw(0, .95), draw(.9, .999)))
        found.append(dict(drawn, lr=draw(.001, .1)))
    different = []
    for recipe in found:
        if recipe not in different and useful(recipe): different.append(recipe)
    return different


def takes(name): return set(inspect.signature(constructor(name)).parameters)


def agrees(holds, diffs):
    "Do the differences show what `holds` says?"
    moving = [d for s, d in diffs.items() if s != 'constant']
    if holds == 'any schedule': return all(d < 1e-12 for d in diffs.values())
    if holds == 'constant lr':
        return diffs['constant'] < 1e-12 and all(d > 1e-6 for d in moving)
    return all(d > 1e-6 or math.isnan(d) for d in diffs.values())


def failures(src, dst):
    """The recipes of `src` whose translation does not do what it claims, each in a
    sentence."""
    found = []
    for h in recipes(src):
        t = translate(h, src, dst)
        args = t.args or copied(h, src, dst)
        if args.get('nesterov') and (not args['momentum'] or args['dampening']):
            args['nesterov'] = False
        older = not (set(h) <= takes(src) and set(args) <= takes(dst))
        if older: continue      # a version without a switch
        d = apart(src, h, dst, args)
        if agrees(t.holds, d): continue
        found.append(f"{src} {h} -> {dst} {args} claims '{t.holds}', "
                     f'differences {d}; {using(src, dst)}')
    return found


# ---- the table

OURS = 'SGD', 'SGDW', 'DecoupledSGDW', 'Lion', 'Adam', 'AdamW', 'DecoupledAdamW'


def test_the_table_covers_the_named_optimizers():
    assert set(optimizers) == {
        'torch.SGD', 'torch.Adam', 'torch.AdamW',
        'composer.DecoupledSGDW', 'composer.DecoupledAdamW',
        'fastai.SGD', 'fastai.Adam', 'fastai.Lamb',
        'timm.SGDW', 'timm.NAdamW', 'timm.Lamb', 'optimi.SGD', 'optimi.AdamW',
        *(f'optim.{o}' for o in OURS)}
    assert len(PAIRS) == 380
    verdicts = {translate(h, a, b).holds for a, b in PAIRS for h in recipes(a)}
    assert verdicts == {'any schedule', 'constant lr', 'none'}


HOW = {'params', 'foreach', 'fused', 'debug', 'capturable', 'differentiable', 'triton',
       'kahan_sum', 'gradient_release',
       'lr0'}      # None there, the lr that a group is added with
NEW = {'decoupled_weight_decay', 'clipping_threshold', 'caution',
       'corrected_weight_decay'}      # may be missing in older versions


@pytest.mark.parametrize('name', optimizers)
def test_defaults_are_those_of_the_library(name):
    needs(name)
    stated = {}
    for p in inspect.signature(constructor(name)).parameters.values():
        if p.name in HOW: continue
        stated[p.name] = ... if p.default is p.empty else p.default
    ours = dict(optimizers[name].defaults)
    for k in NEW - stated.keys(): ours.pop(k, None)
    assert stated == ours, using(name)


@pytest.mark.parametrize('src', optimizers)
@pytest.mark.parametrize('dst', optimizers)
def test_translations_do_what_they_claim(src, dst):
    needs(src, dst)
    assert failures(src, dst) == []


def test_a_library_that_changes_its_numbers_is_named(monkeypatch):
    needs('timm.SGDW')
    run.cache_clear()
    real = rosetta.constructor

    class Changed(real('timm.SGDW')):
        def step(self):
            for g in self.param_groups: g['lr'] *= 1.0001
            super().step()

    def changed(name): return Changed if name == 'timm.SGDW' else real(name)
    monkeypatch.setattr(rosetta, 'constructor', changed)
    found = failures('optim.SGDW', 'timm.SGDW')
    run.cache_clear()
    assert len(found) > 3 and f"torch {version('torch')} (proven" in found[0]
    assert f"timm {version('timm')} (proven with {PROVEN['timm']})" in found[0]


@pytest.fixture
def wrong_decay(monkeypatch):
    "Every translation has a fault of ours."
    def wrong(hypers, src, dst):
        t = rosetta.translate(hypers, src, dst)
        return t._replace(args={**t.args, 'weight_decay': 0.5})
    monkeypatch.setitem(globals(), 'translate', wrong)


def test_a_wrong_translation_is_found(wrong_decay):
    assert len(failures('optim.SGDW', 'composer.DecoupledSGDW')) > 3


SAME = ('family', 'lr', 'momentum', 'betas', 'eps', 'dampening', 'nesterov',
        'weight_decay', 'maximize', 'amsgrad')


@pytest.mark.parametrize('src,dst', PAIRS)
def test_exact_translations_lead_back(src, dst):
    "There and back again is the same optimizer, in the common form."
    for h in recipes(src):
        t = translate(h, src, dst)
        if t.holds != 'any schedule': continue
        back = translate(t.args, dst, src)
        assert back.holds == 'any schedule', (h, t, back)
        before, after = canonical(src, h), canonical(src, back.args)
        for k in SAME:
            want = after.get(k)
            if isinstance(before.get(k), (float, tuple)):
                want = pytest.approx(want, rel=1e-12)
            assert before.get(k) == want, (k, h, t, back)


def test_everything_that_matters_is_written_out():
    for src, dst in PAIRS:
        for h in recipes(src):
            args = translate(h, src, dst).args
            if not args: continue
            for k, default in optimizers[dst].defaults.items():
                assert k in args or default in (False, None), (dst, k)
            arguments(dst, args)      # the destination takes them


# ---- the reasons

@pytest.mark.parametrize('src,dst,h', [
    ('torch.SGD', 'composer.DecoupledSGDW',
     dict(lr=.02, momentum=.9, weight_decay=.01)),
    ('optim.SGD', 'optim.SGDW', dict(lr=.01, momentum=.6, weight_decay=.5)),
    ('composer.DecoupledSGDW', 'torch.SGD',
     dict(lr=.02, momentum=.9, weight_decay=2e-3)),
    ('timm.SGDW', 'optim.SGD', dict(lr=.05, momentum=.8, weight_decay=1.))])
def test_the_preset_in_the_reason_makes_it_exact(src, dst, h):
    needs(src, dst)
    t = translate(h, src, dst)
    factor = float(t.why.split('preset to ')[1].split(' ')[0])

    def preset(opt, step):
        if step > 0: return
        for p in opt.param_groups[0]['params']:
            opt.state[p]['momentum_buffer'] = factor*p.detach()

    want = follow(src, h)
    off = max_diff(want, follow(dst, t.args, each=preset))
    assert off < 1e-6      # the reason gives six digits
    assert max_diff(want, follow(dst, t.args)) > 1e-3


@pytest.mark.parametrize('src,dst,h', [
    ('torch.SGD', 'composer.DecoupledSGDW',
     dict(lr=.05, momentum=.9, weight_decay=.02)),
    ('composer.DecoupledSGDW', 'torch.SGD',
     dict(lr=.05, momentum=.9, weight_decay=5e-3)),
    ('torch.SGD', 'optim.SGDW', dict(lr=.05, momentum=.9, weight_decay=.02)),
    ('optim.SGDW', 'torch.SGD', dict(lr=.05, momentum=.9, weight_decay=.1)),
    ('torch.SGD', 'fastai.SGD', dict(lr=.05, momentum=.9, dampening=.5)),
    ('torch.SGD', 'composer.DecoupledSGDW',
     dict(lr=.01, momentum=.9, nesterov=True, weight_decay=.02))])
def test_in_the_long_run_the_closest_setting_is_closer_than_copied_numbers(src, dst, h):
    needs(src, dst)
    def end(name, args): return follow(name, args, steps=300)[-20:]
    t, want = translate(h, src, dst), end(src, h)
    assert t.holds == 'none'
    off = max_diff(want, end(dst, copied(h, src, dst)))
    assert max_diff(want, end(dst, t.args)) < off/4


@pytest.mark.parametrize('src,dst,h,part', [
    ('torch.SGD', 'composer.DecoupledSGDW',
     dict(momentum=.99, lr=.1, weight_decay=5e-4), 'swings weights through zero'),
    ('torch.Adam', 'torch.AdamW', dict(weight_decay=.1),
     'adds weight_decay*p to the gradient'),
    ('torch.SGD', 'torch.Adam', {}, 'steps along its gradients'),
    ('torch.SGD', 'fastai.SGD', dict(momentum=.9, nesterov=True),
     'nothing like nesterov'),
    ('timm.Lamb', 'fastai.Lamb', {}, 'nothing like max_grad_norm=1.0'),
    ('torch.AdamW', 'timm.NAdamW', {}, 'a second time'),
    ('torch.SGD', 'optimi.SGD', dict(momentum=.9, dampening=.5),
     'first gradient undamped')])
def test_reasons_are_one_sentence(src, dst, h, part):
    t = translate(h, src, dst)
    assert t.holds == 'none' and part in t.why
    assert t.why.startswith((src, dst)) and t.why.endswith('.') and '. ' not in t.why


# ---- what the context says

@pytest.mark.filterwarnings('ignore:lr=.* is above lr0')
@pytest.mark.parametrize('composer,other,h', [
    ('composer.DecoupledSGDW', 'fastai.SGD', dict(lr=.05, mom=.9, wd=.1)),
    ('optim.DecoupledAdamW', 'torch.AdamW', dict(lr=.05, weight_decay=.1))])
def test_initial_lr_is_what_composers_decay_is_relative_to(composer, other, h):
    """Composer under OneCycleLR, which sets initial_lr to max_lr/25: here with our
    port's lr0."""
    needs(other)
    def build(ps, **kw): return constructor(composer)([dict(params=ps, lr0=.002)], **kw)
    t = translate(h, other, composer, initial_lr=.002)
    back = translate(t.args, composer, other, initial_lr=.002)
    without = translate(h, other, composer)
    for s in schedules:
        want = follow(other, h, s)
        assert max_diff(want, follow(build, t.args, s)) < 1e-12
        assert max_diff(want, follow(other, back.args, s)) < 1e-12
        assert max_diff(want, follow(build, without.args, s)) > 1e-3


def test_the_cap_of_fastais_lamb():
    needs('fastai.Lamb', 'timm.Lamb')
    h = dict(lr=.05, wd=.1)
    t = translate(h, 'fastai.Lamb', 'timm.Lamb')
    assert t.holds == 'any schedule' and 'caps the trust ratio at 10' in t.why
    for scale, same in ((1., True), (100., False)):
        want = follow('fastai.Lamb', h, scale=scale)
        off = max_diff(want, follow('timm.Lamb', t.args, scale=scale))
        assert off < 1e-12 if same else off > 1e-3
    for ratio, holds in ((9., 'any schedule'), (10.5, 'none')):
        found = translate(h, 'fastai.Lamb', 'timm.Lamb', trust_ratio=ratio)
        assert found.holds == holds
    back = translate(t.args, 'timm.Lamb', 'fastai.Lamb', trust_ratio=11)
    assert back.holds == 'none'


# ---- Composer's recorded numbers

class Trained(NamedTuple):
    "A parameter of a recorded run, and an optimizer of its own."
    param: torch.Tensor
    opt: object
    lr: float


def tensors(case, values):
    found = []
    for v, shape in zip(values, case['shapes']):
        found.append(torch.tensor(v, dtype=torch.float64).reshape(shape))
    return found


def trained(case, dst):
    """Each parameter with the translation of its group, or an empty list if one of
    them is not exact."""
    params = tensors(case, case['params'])
    found = []
    for p, group in zip(params, case['groups'] or [{}]*len(params)):
        recipe = {**case['kwargs'], **group}
        t = translate(recipe, f"composer.{case['optimizer']}", dst)
        if t.holds != 'any schedule': return []
        opt = constructor(dst)([p.requires_grad_()], **t.args)
        found.append(Trained(p, opt, t.args['lr']))
    return found


def replay(case, dst):
    "Largest difference of `dst` from what Composer recorded; None if not translatable."
    parts = trained(case, dst)
    if not parts: return None
    diffs = []
    for step, (grads, want) in enumerate(zip(case['grads'], case['expected'])):
        factor = case['lr_factors'][step] if case['lr_factors'] else 1.
        for i, (part, g) in enumerate(zip(parts, tensors(case, grads))):
            if [step, i] in case['missing_grads']: continue
            part.param.grad = g
            set_lr(part.opt, part.lr*factor)
            part.opt.step()
        diffs.append(max_diff([part.param for part in parts], tensors(case, want)))
    return max(diffs)


@pytest.mark.parametrize('dst', optimizers)
def test_composers_recorded_numbers(dst):
    needs(dst)
    found = {c['name']: replay(c, dst) for c in CASES}
    reached = {k: d for k, d in found.items() if d is not None}
    for k, d in reached.items(): assert d < 1e-12, (k, d, using(dst))
    family = optimizers[dst].family
    assert not reached or family in ('sgd', 'adam')
    decoupled = ('composer.DecoupledSGDW', 'optim.DecoupledSGDW', 'timm.SGDW',
                 'optim.SGDW')
    if dst in decoupled: assert len(reached) >= 6
    elif family in ('sgd', 'adam') and dst != 'optim.Adam': assert len(reached) >= 3


def test_recorded_numbers_notice_a_fault(wrong_decay):
    dst = dict(DecoupledSGDW='optim.SGDW', DecoupledAdamW='torch.AdamW')
    for case in CASES: assert replay(case, dst[case['optimizer']]) > 1e-6


# ---- bad input, and the command

ALL = 'known are torch.SGD, torch.Adam,'


class Bad(NamedTuple):
    "A call of `translate` that is refused."
    message: str
    hypers: dict
    src: str = 'torch.SGD'
    dst: str = 'fastai.SGD'
    context: dict = {}


@pytest.mark.parametrize('bad', [
    Bad(f"unknown optimizer 'torch.Sgd'; {ALL}", dict(lr=.1), src='torch.Sgd'),
    Bad(f"unknown optimizer 'jax.sgd'; {ALL}", dict(lr=.1), dst='jax.sgd'),
    Bad("unknown argument of torch.SGD 'wd'; known are lr, momentum, dampening, "
        'weight_decay, nesterov, maximize', dict(lr=.1, wd=1.)),
    Bad("unknown context 'peak'; known are initial_lr, trust_ratio", dict(lr=.1),
        context=dict(peak=.2)),
    Bad('fastai.SGD needs lr, it has no default', {}, src='fastai.SGD'),
    Bad('lr must be a number > 0, got -1.0', dict(lr=-1.)),
    Bad("lr must be a number > 0, got '0.1'", dict(lr='0.1')),
    Bad('initial_lr must be a number > 0, got 0', dict(lr=.1),
        context=dict(initial_lr=0)),
    Bad('betas must be two numbers in [0, 1), got (0.9, 1.0)', dict(betas=(.9, 1.)),
        src='torch.Adam'),
    Bad('nesterov needs a momentum > 0 and dampening 0', dict(nesterov=True))])
def test_bad_input(bad):
    with pytest.raises(ValueError) as e:
        translate(bad.hypers, bad.src, bad.dst, **bad.context)
    assert bad.message in str(e.value) and '\n' not in str(e.value)


def test_an_unknown_schedule():
    message = ("unknown schedule 'cosine'; "
               'known are constant, warm-up and cosine, OneCycle')
    with pytest.raises(ValueError) as e: follow('torch.SGD', dict(lr=.1), 'cosine')
    assert str(e.value) == message


def command(*args):
    code = 'import sys; from optimizers_explained.rosetta import main; sys.exit(main())'
    call = [sys.executable, '-c', code, *args]
    return subprocess.run(call, capture_output=True, text=True)


def test_the_command_as_a_process():
    recipe = ('torch.SGD composer.DecoupledSGDW '
              '--lr 0.1 --momentum 0.9 --weight-decay 1e-4')
    done = command(*recipe.split(), '--json')
    h = dict(lr=.1, momentum=.9, weight_decay=1e-4)
    t = translate(h, 'torch.SGD', 'composer.DecoupledSGDW')
    assert done.returncode == 0 and not done.stderr
    assert json.loads(done.stdout) == dict(args=t.args, holds='none', why=t.why)


SAYS = {'any schedule': 'exact under any schedule',
        'constant lr': 'exact at a constant', 'none': 'no translation'}


@pytest.mark.parametrize('line,args,holds', [
    ('torch.AdamW fastai.Adam --betas 0.9 0.99 --eps 1e-6',
     dict(lr=1e-3, mom=.9, sqr_mom=.99, eps=1e-6, wd=.01, decouple_wd=True),
     'any schedule'),
    ('fastai.SGD composer.DecoupledSGDW --lr .1 --wd 1e-3 --decouple-wd true',
     dict(lr=.1, momentum=0., dampening=0., weight_decay=1e-4, nesterov=False),
     'any schedule'),
    ('timm.SGDW optim.SGDW --lr .1 --momentum .9 --weight-decay .1 '
     '--corrected-weight-decay',
     dict(lr=.1, momentum=.9, dampening=0., weight_decay=.1, nesterov=False),
     'constant lr'),
    ('timm.Lamb torch.Adam --weight-decay 0 --max-grad-norm none',
     dict(lr=1e-3, betas=[.9, .999], eps=1e-6, weight_decay=0.), 'any schedule'),
    ('torch.SGD optim.Lion', {}, 'none'),
    ('fastai.SGD composer.DecoupledSGDW --lr .05 --wd .1 --initial-lr .002',
     dict(lr=.05, momentum=0., dampening=0., weight_decay=2e-4, nesterov=False),
     'any schedule')])
def test_the_command_in_json_and_in_words(line, args, holds, capsys):
    assert rosetta.main([*line.split(), '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ['args', 'holds', 'why']
    assert (found['args'], found['holds']) == (args, holds)
    assert rosetta.main(line.split()) == 0
    text = capsys.readouterr().out
    assert SAYS[holds] in text and found['why'] in text
    assert not args or line.split()[1] + '(params, ' in text


SGD = 'torch.SGD fastai.SGD'


@pytest.mark.parametrize('line,message', [
    ('', 'the following arguments are required: src, dst'),
    ('torch.SGD', 'the following arguments are required: dst'),
    ('torch.Sgd fastai.SGD', "unknown optimizer 'torch.Sgd'; known are torch.SGD"),
    ('torch.SGD fastai.Sgd', "unknown optimizer 'fastai.Sgd'; known are torch.SGD"),
    (f'{SGD} --wd 1', "unknown argument of torch.SGD 'wd'; known are lr, momentum"),
    (f'{SGD} --speed 1',
     "unknown argument of torch.SGD 'speed'; known are lr, momentum"),
    (f'{SGD} --weight 1',
     "unknown argument of torch.SGD 'weight'; known are lr, momentum"),
    (f'{SGD} more', "unknown argument of torch.SGD 'more'; known are lr, momentum"),
    (f'{SGD} --lr fast',
     "argument --lr: must be a number, true, false or none, got 'fast'"),
    (f'{SGD} --lr -0.1', 'lr must be a number > 0, got -0.1'),
    (f'{SGD} --lr', 'lr must be a number > 0, got True'),
    (f'{SGD} --nesterov 3', 'nesterov must be True or False, got 3.0'),
    ('fastai.SGD torch.SGD', 'fastai.SGD needs lr, it has no default')])
def test_bad_input_of_the_command_is_one_line_and_2(line, message, capsys):
    try: code = rosetta.main(line.split())
    except SystemExit as e: code = e.code
    out, err = capsys.readouterr()
    assert code == 2 and not out and message in err
    assert err.startswith('oe-translate: ') and err.count('\n') == 1


def test_help_names_the_optimizers_and_options(capsys):
    with pytest.raises(SystemExit) as e: rosetta.main(['--help'])
    text = capsys.readouterr().out
    assert e.value.code == 0
    options = {'initial_lr', 'trust_ratio', 'json'}
    for name, signature in optimizers.items():
        assert name in text
        options.update(signature.defaults)
    for k in options: assert f"--{k.replace('_', '-')}" in text


def test_translating_needs_no_library():
    code = '''if True:
        import sys
        sys.modules.update(timm=None, fastai=None, optimi=None)
        from optimizers_explained.rosetta import translate
        print(translate(dict(lr=1.), 'fastai.SGD', 'timm.SGDW').holds)'''
    found = subprocess.check_output([sys.executable, '-c', code], text=True)
    assert found == 'any schedule\n'
