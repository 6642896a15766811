"""Every entry of the table, run on both sides: all ordered pairs, many recipes, three schedules; Composer's recorded numbers; the command.

A library that is not installed is skipped by name. One that changes its numbers or its defaults fails here, with its version and the one
that the table was proven with."""
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

import pytest
import torch

from optimizers_explained import rosetta
from optimizers_explained.problems import max_diff
from optimizers_explained.rosetta import arguments, canonical, constructor, copied, follow, optimizers, schedules, translate



@pytest.fixture(autouse=True)
def no_advice():
    "The recipes are translated, so Composer's advice on large decays is not needed here; other tests want to see it."
    log = logging.getLogger('optimizers_explained.composer')
    level = log.level
    log.setLevel('ERROR')
    yield
    log.setLevel(level)

# optimi's, and torch's when fastai is imported
pytestmark = [pytest.mark.filterwarnings(f'ignore:{o}') for o in ('You are using weight_decay', '.torch.jit.script')]
CASES = json.loads((Path(__file__).parent/'composer.json').read_text())['cases']
PROVEN = {'torch': '2.15.0', 'timm': '1.0.31', 'fastai': '2.8.12', 'torch-optimi': '0.3.3'}
DISTRIBUTION = dict(torch='torch', timm='timm', fastai='fastai', optimi='torch-optimi',
                    composer='optimizers_explained', optim='optimizers_explained')
PAIRS = list(itertools.permutations(optimizers, 2))


def distribution(name): return DISTRIBUTION[name.split('.')[0]]


def needs(*names):
    for name in names:
        try: constructor(name)
        except ImportError: pytest.skip(f'{distribution(name)} is not installed: {name} is not compared')


def using(*names):
    "The libraries of a comparison, with their versions and the proven ones."
    found = dict.fromkeys(['torch', *map(distribution, names)])
    return ', '.join(f'{d} {version(d)} (proven with {PROVEN.get(d, "this version")})' for d in found)


@cache
def run(name, args, schedule): return follow(name, dict(args), schedule, steps=20)


def apart(src, hypers, dst, args):
    "The largest difference over a run, for each schedule."
    key = lambda h: tuple(sorted(h.items()))
    return {s: max_diff(run(src, key(hypers), s), run(dst, key(args), s)) for s in schedules}


# ---- recipes

WITH = {'sgd': [dict(), dict(mom=.9), dict(wd=.1), dict(mom=.9, wd=.02), dict(mom=.9, wd=.2), dict(mom=.6, wd=.2)],
        'other': [dict(), dict(wd=0.), dict(wd=.2), dict(b=(.8, .95), eps=1e-3), dict(b=(.8, .95), eps=1e-3, wd=.2),
                  dict(b=(0., .95), wd=0.), dict(b=(0., .95), wd=.2)]}
DAMPED = [dict(dampening=.5), dict(dampening=.9), dict(nesterov=True)]
OPTIMI = [dict(dampening=d, torch_init=t, **o) for d, t in ((False, False), (True, False), (True, True))
          for o in (dict(), dict(decouple_wd=True), dict(decouple_lr=True), dict(decouple_lr=True, max_lr=.2))]
LAMB = [dict(max_grad_norm=n, **o) for n in (1., None) for o in (
    dict(), dict(always_adapt=True), dict(grad_averaging=False), dict(bias_correction=False), dict(decoupled_decay=True),
    dict(trust_clip=True), dict(decoupled_decay=True, grad_averaging=False), dict(decoupled_decay=True, corrected_weight_decay=True),
    dict(grad_averaging=False, always_adapt=True))]
SWITCHES = ['maximize', 'amsgrad', 'caution', 'corrected_weight_decay', 'decoupled_weight_decay', 'decouple_wd', 'decouple_lr']


def named(name, mom=None, wd=None, b=None, **rest):
    "A recipe in the words of `name`."
    words = optimizers[name][2]
    given = dict(lr=.05, momentum=mom, mom=b[0] if b else mom, sqr_mom=b and b[1], betas=b, weight_decay=wd, wd=wd, **rest)
    return {k: v for k, v in given.items() if k in words and (v is not None or k in rest)}


def recipes(name):
    "Recipes of `name`: plain, momentum, decay, dampening, Nesterov, betas and eps, and each switch; and three at random."
    family, _, words = optimizers[name]
    base = WITH['sgd' if family == 'sgd' else 'other']
    extra = [dict()] + [{k: not words[k]} for k in SWITCHES if k in words]
    if type(words.get('dampening')) is float: extra += [o for o in DAMPED]
    if 'clipping_threshold' in words: extra += [dict(clipping_threshold=.5)]
    draw = random.Random(name).uniform
    found = [named(name, **o, **e) for o in base for e in extra]
    found += [named(name, **o, **e) for o in base[:4] for e in {'optimi.SGD': OPTIMI, 'timm.Lamb': LAMB}.get(name, [])]
    drawn = lambda: named(name, mom=draw(0, .95), wd=draw(0, .5), b=(draw(0, .95), draw(.9, .999)))
    found += [dict(drawn(), lr=draw(.001, .1)) for _ in range(3)]
    def useful(h):
        if h.get('nesterov') and not h.get('momentum'): return False
        return not (h.get('caution') and h.get('betas', (1,))[0] == 0)         # there, only a gradient of exactly zero shows it
    return [h for i, h in enumerate(found) if h not in found[:i] and useful(h)]


def takes(name): return set(inspect.signature(constructor(name)).parameters)


def agrees(holds, d):
    "Do the differences `d` show what `holds` says?"
    exact, moving = {s: v < 1e-12 for s, v in d.items()}, [v for s, v in d.items() if s != 'constant']
    if holds == 'any schedule': return all(exact.values())
    if holds == 'constant lr': return exact['constant'] and all(v > 1e-6 for v in moving)
    return all(v > 1e-6 or math.isnan(v) for v in d.values())


def failures(src, dst):
    "The recipes of `src` whose translation does not do what it claims, each in a sentence."
    for h in recipes(src):
        t = translate(h, src, dst)
        args = t.args or copied(h, src, dst)
        if args.get('nesterov') and (not args['momentum'] or args['dampening']): args['nesterov'] = False
        if not (set(h) <= takes(src) and set(args) <= takes(dst)): continue    # a switch that an older version does not have
        d = apart(src, h, dst, args)
        if not agrees(t.holds, d): yield f"{src} {h} -> {dst} {args} claims '{t.holds}', differences {d}; {using(src, dst)}"


# ---- the table

def test_the_table_covers_the_named_optimizers():
    assert set(optimizers) == {
        'torch.SGD', 'torch.Adam', 'torch.AdamW', 'composer.DecoupledSGDW', 'composer.DecoupledAdamW',
        'fastai.SGD', 'fastai.Adam', 'fastai.Lamb', 'timm.SGDW', 'timm.NAdamW', 'timm.Lamb', 'optimi.SGD', 'optimi.AdamW',
        *(f'optim.{o}' for o in ('SGD', 'SGDW', 'DecoupledSGDW', 'Lion', 'Adam', 'AdamW', 'DecoupledAdamW'))}
    assert len(PAIRS) == 380 and {translate(h, a, b).holds for a, b in PAIRS for h in recipes(a)} == {'any schedule', 'constant lr', 'none'}


HOW = {'params', 'foreach', 'fused', 'debug', 'capturable', 'differentiable', 'triton', 'kahan_sum',
       'gradient_release', 'lr0'}      # lr0: None there, the lr that a group is added with


@pytest.mark.parametrize('name', optimizers)
def test_defaults_are_those_of_the_library(name):
    needs(name)
    ps = [p for p in inspect.signature(constructor(name)).parameters.values() if p.name not in HOW]
    stated = {p.name: ... if p.default is p.empty else p.default for p in ps}
    older = 'decoupled_weight_decay', 'clipping_threshold', 'caution', 'corrected_weight_decay'     # may be missing in older versions
    assert stated == {k: v for k, v in optimizers[name][2].items() if k in stated or k not in older}, using(name)


@pytest.mark.parametrize('src', optimizers)
@pytest.mark.parametrize('dst', optimizers)
def test_translations_do_what_they_claim(src, dst):
    needs(src, dst)
    assert list(failures(src, dst)) == []


def test_a_library_that_changes_its_numbers_is_named(monkeypatch):
    needs('timm.SGDW')
    run.cache_clear()
    real = rosetta.constructor
    class Changed(real('timm.SGDW')):
        def step(self):
            for g in self.param_groups: g['lr'] *= 1.0001
            super().step()
    monkeypatch.setattr(rosetta, 'constructor', lambda name: Changed if name == 'timm.SGDW' else real(name))
    found = list(failures('optim.SGDW', 'timm.SGDW'))
    run.cache_clear()
    assert len(found) > 3 and f"torch {version('torch')} (proven" in found[0]
    assert f"timm {version('timm')} (proven with {PROVEN['timm']})" in found[0]


def test_a_wrong_translation_is_found(monkeypatch):
    monkeypatch.setattr(rosetta, '_written', lambda *a, real=rosetta._written: {**real(*a), 'weight_decay': 0.1})
    assert len(list(failures('optim.SGDW', 'composer.DecoupledSGDW'))) > 3


@pytest.mark.parametrize('src,dst', PAIRS)
def test_exact_translations_lead_back(src, dst):
    "There and back again is the same optimizer, in the common form."
    for h in recipes(src):
        t = translate(h, src, dst)
        if t.holds != 'any schedule': continue
        back = translate(t.args, dst, src)
        assert back.holds == 'any schedule', (h, t, back)
        a, b = canonical(src, h), canonical(src, back.args)
        for k in ('family', 'lr', 'momentum', 'betas', 'eps', 'dampening', 'nesterov', 'weight_decay', 'maximize', 'amsgrad'):
            assert a.get(k) == (pytest.approx(b[k], rel=1e-12) if isinstance(a.get(k), (float, tuple)) else b.get(k)), (k, h, t, back)


def test_everything_that_matters_is_written_out():
    for src, dst in PAIRS:
        for h in recipes(src):
            args = translate(h, src, dst).args
            left_out = set(optimizers[dst][2]) - set(args) if args else set()
            assert all(optimizers[dst][2][k] in (False, None) for k in left_out), (dst, left_out)
            arguments(dst, args or dict(lr=.1))                                # the destination takes them


# ---- the reasons

@pytest.mark.parametrize('src,dst,h', [
    ('torch.SGD', 'composer.DecoupledSGDW', dict(lr=.02, momentum=.9, weight_decay=.01)),
    ('optim.SGD', 'optim.SGDW', dict(lr=.01, momentum=.6, weight_decay=.5)),
    ('composer.DecoupledSGDW', 'torch.SGD', dict(lr=.02, momentum=.9, weight_decay=2e-3)),
    ('timm.SGDW', 'optim.SGD', dict(lr=.05, momentum=.8, weight_decay=1.))])
def test_the_preset_in_the_reason_makes_it_exact(src, dst, h):
    needs(src, dst)
    t = translate(h, src, dst)
    factor = float(t.why.split('preset to ')[1].split(' ')[0])
    def preset(opt, step):
        for p in opt.param_groups[0]['params']*(step == 0): opt.state[p]['momentum_buffer'] = factor*p.detach()
    want = follow(src, h)
    assert max_diff(want, follow(dst, t.args, each=preset)) < 1e-6             # the reason gives six digits
    assert max_diff(want, follow(dst, t.args)) > 1e-3


@pytest.mark.parametrize('src,dst,h', [
    ('torch.SGD', 'composer.DecoupledSGDW', dict(lr=.05, momentum=.9, weight_decay=.02)),
    ('composer.DecoupledSGDW', 'torch.SGD', dict(lr=.05, momentum=.9, weight_decay=5e-3)),
    ('torch.SGD', 'optim.SGDW', dict(lr=.05, momentum=.9, weight_decay=.02)),
    ('optim.SGDW', 'torch.SGD', dict(lr=.05, momentum=.9, weight_decay=.1)),
    ('torch.SGD', 'fastai.SGD', dict(lr=.05, momentum=.9, dampening=.5)),
    ('torch.SGD', 'composer.DecoupledSGDW', dict(lr=.01, momentum=.9, nesterov=True, weight_decay=.02))])
def test_in_the_long_run_the_closest_setting_is_closer_than_copied_numbers(src, dst, h):
    needs(src, dst)
    t, end = translate(h, src, dst), lambda name, args: follow(name, args, steps=300)[-20:]
    assert t.holds == 'none'
    want = end(src, h)
    assert max_diff(want, end(dst, t.args)) < max_diff(want, end(dst, copied(h, src, dst)))/4


@pytest.mark.parametrize('src,dst,h,part', [
    ('torch.SGD', 'composer.DecoupledSGDW', dict(momentum=.99, lr=.1, weight_decay=5e-4), 'swings weights through zero'),
    ('torch.Adam', 'torch.AdamW', dict(weight_decay=.1), 'adds weight_decay*p to the gradient'),
    ('torch.SGD', 'torch.Adam', {}, 'steps along its gradients'),
    ('torch.SGD', 'fastai.SGD', dict(momentum=.9, nesterov=True), 'nothing like nesterov'),
    ('timm.Lamb', 'fastai.Lamb', {}, 'nothing like max_grad_norm=1.0'), ('torch.AdamW', 'timm.NAdamW', {}, 'a second time'),
    ('torch.SGD', 'optimi.SGD', dict(momentum=.9, dampening=.5), 'first gradient undamped')])
def test_reasons_are_one_sentence(src, dst, h, part):
    t = translate(h, src, dst)
    assert t.holds == 'none' and part in t.why and t.why.endswith('.') and '. ' not in t.why and t.why.startswith((src, dst))


# ---- what the context says

@pytest.mark.filterwarnings('ignore:lr=.* is above lr0')
def test_initial_lr_is_what_composers_decay_is_relative_to():
    "Composer under OneCycleLR, which sets initial_lr to max_lr/25: here with our port's lr0."
    needs('fastai.SGD')
    build = lambda name: lambda ps, **kw: constructor(name)([dict(params=ps, lr0=.002)], **kw)
    for composer, other, h in (('composer.DecoupledSGDW', 'fastai.SGD', dict(lr=.05, mom=.9, wd=.1)),
                               ('optim.DecoupledAdamW', 'torch.AdamW', dict(lr=.05, weight_decay=.1))):
        t = translate(h, other, composer, initial_lr=.002)
        back = translate(t.args, composer, other, initial_lr=.002)
        for s in schedules:
            assert max_diff(follow(other, h, s), follow(build(composer), t.args, s)) < 1e-12
            assert max_diff(follow(other, h, s), follow(other, back.args, s)) < 1e-12
            assert max_diff(follow(other, h, s), follow(build(composer), translate(h, other, composer).args, s)) > 1e-3


def test_the_cap_of_fastais_lamb():
    needs('fastai.Lamb', 'timm.Lamb')
    h = dict(lr=.05, wd=.1)
    t = translate(h, 'fastai.Lamb', 'timm.Lamb')
    assert t.holds == 'any schedule' and 'caps the trust ratio at 10' in t.why
    assert max_diff(follow('fastai.Lamb', h), follow('timm.Lamb', t.args)) < 1e-12
    assert max_diff(follow('fastai.Lamb', h, scale=100.), follow('timm.Lamb', t.args, scale=100.)) > 1e-3
    assert [translate(h, 'fastai.Lamb', 'timm.Lamb', trust_ratio=r).holds for r in (9., 10.5)] == ['any schedule', 'none']
    assert translate(t.args, 'timm.Lamb', 'fastai.Lamb', trust_ratio=11).holds == 'none'


# ---- Composer's recorded numbers

def replay(case, dst):
    "Largest difference of `dst`, each parameter with the translation of its group, from what Composer recorded; None if one is not exact."
    f64 = lambda xs: [torch.tensor(x, dtype=torch.float64).reshape(s) for x, s in zip(xs, case['shapes'])]
    ps = [p.requires_grad_() for p in f64(case['params'])]
    ts = [translate({**case['kwargs'], **g}, 'composer.' + case['optimizer'], dst) for g in case['groups'] or [{}]*len(ps)]
    if any(t.holds != 'any schedule' for t in ts): return None
    opts, diffs = [constructor(dst)([p], **t.args) for p, t in zip(ps, ts)], []
    for step, (grads, want) in enumerate(zip(case['grads'], case['expected'])):
        factor = case['lr_factors'][step] if case['lr_factors'] else 1.
        for i, (p, g, t, opt) in enumerate(zip(ps, f64(grads), ts, opts)):
            if [step, i] in case['missing_grads']: continue
            p.grad, lr = g, t.args['lr']*factor
            if hasattr(opt, 'set_hyper'): opt.set_hyper('lr', lr)
            else: opt.param_groups[0]['lr'] = lr
            opt.step()
        diffs.append(max_diff(ps, f64(want)))
    return max(diffs)


@pytest.mark.parametrize('dst', optimizers)
def test_composers_recorded_numbers(dst):
    needs(dst)
    found = {c['name']: replay(c, dst) for c in CASES}
    assert all(v is None or v < 1e-12 for v in found.values()), (found, using(dst))
    reached = sum(v is not None for v in found.values())
    family = optimizers[dst][0]
    decoupled_sgd = dst in ('composer.DecoupledSGDW', 'optim.DecoupledSGDW', 'timm.SGDW', 'optim.SGDW')
    assert reached >= (6 if decoupled_sgd else 3 if family in ('sgd', 'adam') and dst != 'optim.Adam' else 0)
    assert reached == 0 or family in ('sgd', 'adam')


def test_recorded_numbers_notice_a_fault(monkeypatch):
    monkeypatch.setattr(rosetta, '_written', lambda *a, real=rosetta._written: {**real(*a), 'weight_decay': 0.5})
    dst = dict(DecoupledSGDW='optim.SGDW', DecoupledAdamW='torch.AdamW')
    for case in CASES: assert replay(case, dst[case['optimizer']]) > 1e-6


# ---- bad input, and the command

@pytest.mark.parametrize('call,message', [
    (lambda: translate(dict(lr=.1), 'torch.Sgd', 'torch.SGD'), "unknown optimizer 'torch.Sgd'; known are torch.SGD, torch.Adam,"),
    (lambda: translate(dict(lr=.1), 'torch.SGD', 'jax.sgd'), "unknown optimizer 'jax.sgd'; known are torch.SGD, torch.Adam,"),
    (lambda: translate(dict(lr=.1, wd=1.), 'torch.SGD', 'fastai.SGD'),
     "unknown argument of torch.SGD 'wd'; known are lr, momentum, dampening, weight_decay, nesterov, maximize"),
    (lambda: translate(dict(lr=.1), 'torch.SGD', 'fastai.SGD', peak=.2), "unknown context 'peak'; known are initial_lr, trust_ratio"),
    (lambda: translate({}, 'fastai.SGD', 'torch.SGD'), 'fastai.SGD needs lr, it has no default'),
    (lambda: translate(dict(lr=-1.), 'torch.SGD', 'fastai.SGD'), 'lr must be a number > 0, got -1.0'),
    (lambda: translate(dict(lr='0.1'), 'torch.SGD', 'fastai.SGD'), "lr must be a number > 0, got '0.1'"),
    (lambda: translate(dict(lr=.1), 'torch.SGD', 'fastai.SGD', initial_lr=0), 'initial_lr must be a number > 0, got 0'),
    (lambda: translate(dict(betas=(.9, 1.)), 'torch.Adam', 'fastai.Adam'), 'betas must be two numbers in [0, 1), got (0.9, 1.0)'),
    (lambda: translate(dict(nesterov=True), 'torch.SGD', 'timm.SGDW'), 'nesterov needs a momentum > 0 and dampening 0'),
    (lambda: follow('torch.SGD', dict(lr=.1), 'cosine'), "unknown schedule 'cosine'; known are constant, warm-up and cosine, OneCycle")])
def test_bad_input(call, message):
    with pytest.raises(ValueError) as e: call()
    assert message in str(e.value) and '\n' not in str(e.value)


def command(*args):
    code = 'import sys; from optimizers_explained.rosetta import main; sys.exit(main())'
    return subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True)


def test_the_command_as_a_process():
    recipe = 'torch.SGD composer.DecoupledSGDW --lr 0.1 --momentum 0.9 --weight-decay 1e-4'.split()
    done = command(*recipe, '--json')
    t = translate(dict(lr=.1, momentum=.9, weight_decay=1e-4), 'torch.SGD', 'composer.DecoupledSGDW')
    assert done.returncode == 0 and not done.stderr
    assert json.loads(done.stdout) == dict(args=t.args, holds='none', why=t.why)


@pytest.mark.parametrize('line,args,holds', [
    ('torch.AdamW fastai.Adam --betas 0.9 0.99 --eps 1e-6',
     dict(lr=1e-3, mom=.9, sqr_mom=.99, eps=1e-6, wd=.01, decouple_wd=True), 'any schedule'),
    ('fastai.SGD composer.DecoupledSGDW --lr .1 --wd 1e-3 --decouple-wd true',
     dict(lr=.1, momentum=0., dampening=0., weight_decay=1e-4, nesterov=False), 'any schedule'),
    ('timm.SGDW optim.SGDW --lr .1 --momentum .9 --weight-decay .1 --corrected-weight-decay',
     dict(lr=.1, momentum=.9, dampening=0., weight_decay=.1, nesterov=False), 'constant lr'),
    ('timm.Lamb torch.Adam --weight-decay 0 --max-grad-norm none',
     dict(lr=1e-3, betas=[.9, .999], eps=1e-6, weight_decay=0.), 'any schedule'),
    ('torch.SGD optim.Lion', {}, 'none'),
    ('fastai.SGD composer.DecoupledSGDW --lr .05 --wd .1 --initial-lr .002',
     dict(lr=.05, momentum=0., dampening=0., weight_decay=2e-4, nesterov=False), 'any schedule')])
def test_the_command_in_json(line, args, holds, capsys):
    assert rosetta.main([*line.split(), '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ['args', 'holds', 'why'] and (found['args'], found['holds']) == (args, holds)
    assert rosetta.main(line.split()) == 0
    text = capsys.readouterr().out
    assert {'any schedule': 'exact under any schedule', 'constant lr': 'exact at a constant', 'none': 'no translation'}[holds] in text
    assert found['why'] in text and (not args or line.split()[1] + '(params, ' in text)


@pytest.mark.parametrize('line,message', [
    ('', 'the following arguments are required: src, dst'),
    ('torch.SGD', 'the following arguments are required: dst'),
    ('torch.Sgd fastai.SGD', "unknown optimizer 'torch.Sgd'; known are torch.SGD"),
    ('torch.SGD fastai.Sgd', "unknown optimizer 'fastai.Sgd'; known are torch.SGD"),
    ('torch.SGD fastai.SGD --wd 1', "unknown argument of torch.SGD 'wd'; known are lr, momentum"),
    ('torch.SGD fastai.SGD --speed 1', "unknown argument of torch.SGD 'speed'; known are lr, momentum"),
    ('torch.SGD fastai.SGD --weight 1', "unknown argument of torch.SGD 'weight'; known are lr, momentum"),
    ('torch.SGD fastai.SGD more', "unknown argument of torch.SGD 'more'; known are lr, momentum"),
    ('torch.SGD fastai.SGD --lr fast', "argument --lr: must be a number, true, false or none, got 'fast'"),
    ('torch.SGD fastai.SGD --lr -0.1', 'lr must be a number > 0, got -0.1'),
    ('torch.SGD fastai.SGD --lr', 'lr must be a number > 0, got True'),
    ('torch.SGD fastai.SGD --nesterov 3', 'nesterov must be True or False, got 3.0'),
    ('fastai.SGD torch.SGD', 'fastai.SGD needs lr, it has no default')])
def test_bad_input_of_the_command_is_one_line_and_2(line, message, capsys):
    try: code = rosetta.main(line.split())
    except SystemExit as e: code = e.code
    out, err = capsys.readouterr()
    assert code == 2 and not out and message in err and err.count('\n') == 1 and err.startswith('oe-translate: ')


def test_help_names_the_optimizers_and_options(capsys):
    with pytest.raises(SystemExit) as e: rosetta.main(['--help'])
    text = capsys.readouterr().out
    assert e.value.code == 0 and all(name in text for name in optimizers)
    options = {k for o in optimizers.values() for k in o[2]} | {'initial_lr', 'trust_ratio', 'json'}
    assert all(f"--{k.replace('_', '-')}" in text for k in options)


def test_translating_needs_no_library():
    code = "import sys; sys.modules.update(timm=None, fastai=None, optimi=None); from optimizers_explained.rosetta import translate; " \
           "print(translate(dict(lr=1.), 'fastai.SGD', 'timm.SGDW').holds)"
    assert subprocess.check_output([sys.executable, '-c', code], text=True) == 'any schedule\n'
