"Each packaging fact stands in one place and reaches the installed package; modules are light to import and fully documented."
import importlib
import inspect
import json
import os
import pkgutil
import re
import stat
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import distribution, entry_points

import pytest
import yaml
from fastcore.docments import docments
from fastcore.nbio import read_nb
from nbdev.config import get_config
from packaging.requirements import Requirement

import optimizers_explained as pkg
from optimizers_explained.contract import ROWS

MODULES = sorted(m.name for m in pkgutil.iter_modules(pkg.__path__) if not m.name.startswith('_'))
GENERATED = re.compile(r'nbs/(nbdev\.yml|llms\.txt)|README\.md|optimizers_explained/.*\.py')
OPTIONAL = 'timm torchvision matplotlib sklearn fastprogress fastai optimi heavyball pytorch_optimizer nbdev IPython'.split()

def module(name): return importlib.import_module(f'{pkg.__name__}.{name}')

# ---- one place for each fact

def written_text(path):
    "A file as people wrote it: of a notebook, the sources without the outputs"
    if path.suffix == '.ipynb': return '\n'.join(c.source for c in read_nb(path).cells)
    return path.read_text(encoding='utf-8', errors='ignore')

def naming(owner, root):
    "Files that people wrote and that name the owner"
    files = subprocess.check_output(['git', 'ls-files', '-co', '--exclude-standard'], cwd=root, text=True).splitlines()
    return [f for f in files if not GENERATED.fullmatch(f) and (root/f).is_file() and owner in written_text(root/f)]

def test_the_owner_is_named_once(root):
    owner = get_config(root).user
    assert owner and naming(owner, root) == ['pyproject.toml']
    inside = re.search(r'^\[project\.urls\]\n(.*?)(?=^\[)', (root/'pyproject.toml').read_text(), re.M | re.S)[0]
    assert owner not in (root/'pyproject.toml').read_text().replace(inside, '')

def test_a_second_owner_would_be_found(tmp_path):
    subprocess.check_call(['git', 'init', '-q'], cwd=tmp_path)
    cell = dict(cell_type='markdown', metadata={}, source=['See https://github.com/someone/lib'])
    (tmp_path/'a.ipynb').write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    (tmp_path/'b.yml').write_text('url: nothing here')
    assert naming('someone', tmp_path) == ['a.ipynb']

def test_the_version_is_written_once(root):
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini')
    assert distribution(pkg.__name__).version == pkg.__version__ == get_config(root).version
    assert 'version' not in cfg.defaults() and not re.search(r'^version\s*=\s*["\']', (root/'pyproject.toml').read_text(), re.M)
    assert 'version' not in (root/'setup.py').read_text().split('setup(')[1]

def test_settings_reach_the_metadata(root):
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini')
    facts, dist = cfg.defaults(), distribution(pkg.__name__)
    meta, lines = dist.metadata, lambda text: [o for o in text.splitlines() if o.strip()]
    assert (meta['License-Expression'] or meta['License']) == facts['license'], 'reinstall: pip install -e .'
    assert meta['Author'] == facts['author']
    assert meta['Keywords'].split(',') == facts['keywords'].split()
    assert set(lines(facts['classifiers'])) <= set(meta.get_all('Classifier'))
    own = {k: lines(cfg['extras'][k]) for k in cfg['extras'] if k not in facts}
    assert {'notebooks', 'bench', 'test', 'dev'} == set(own) == set(meta.get_all('Provides-Extra'))
    stated = {(str(Requirement(r)), None) for r in lines(cfg['requirements']['runtime'])}
    stated |= {(str(Requirement(r)), k) for k, rs in own.items() for r in rs}
    def split(r):
        name, _, marker = r.partition(';')
        extra = re.search(r'extra == ["\'](\w+)["\']', marker)
        return str(Requirement(name)), extra and extra[1]
    assert {split(r) for r in dist.requires} == stated
    scripts = {e.name: e.value for e in dist.entry_points if e.group == 'console_scripts'}
    assert scripts == {k: v for k, v in cfg['commands'].items() if k not in facts}
    assert any(e.value == f'{pkg.__name__}._modidx:d' for e in entry_points(group='nbdev'))

def test_requires_python_agrees_with_the_workflows(root):
    tests = yaml.safe_load((root/'.github/workflows/tests.yml').read_text())
    pythons = tests['jobs']['test']['strategy']['matrix']['python']
    assert get_config(root).min_python == pythons[0] and all(isinstance(p, str) for p in pythons)

# ---- importing

def pulled_in(names, pause=''):
    "Which optional libraries importing the modules loads, module by module, in a fresh process"
    code = f'import sys, importlib, json\nr = {{}}\nfor n in {list(names)!r}:\n {pause or "pass"}\n importlib.import_module(n)\n' \
           f' r[n] = sorted(set({OPTIONAL!r}) & set(sys.modules))\nprint(json.dumps(r))'
    return json.loads(subprocess.check_output([sys.executable, '-c', code], text=True))

def test_modules_import_only_torch_and_fastcore():
    names = [pkg.__name__] + [f'{pkg.__name__}.{m}' for m in MODULES]
    assert pulled_in(names) == {n: [] for n in names}

def test_a_heavy_import_would_be_found(): assert pulled_in(['json'], 'import IPython')['json'] == ['IPython']

# ---- documentation

def methods(cls, module):
    return {k: v for k, v in vars(cls).items() if inspect.isfunction(v) and v.__module__ == module.__name__ and k[0] != '_'}

def parameters(f):
    "Parameters that a caller passes by name or place, with their comments"
    f = f.__init__ if inspect.isclass(f) else f
    if not inspect.isfunction(f): return {}
    kinds = {p.name: p.kind for p in inspect.signature(f).parameters.values()}
    star = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return {k: v for k, v in docments(f, returns=False).items() if k != 'self' and kinds.get(k) not in star}

STEP = ['p', 'g', 'state']

def public(module): return {n: o for n in module.__all__ if inspect.isclass(o := getattr(module, n)) or inspect.isfunction(o)}

def uncommented(f, elsewhere):
    """Parameters without a comment. A step is called by its optimizer, never by a user: what `p`, `g` and `state` are stands once, on the
    page of the core, and its hyperparameters are commented in the optimizers that pass them on (`elsewhere`). Likewise the rows of the
    contract, which `contract` calls."""
    missing = [k for k, comment in parameters(f).items() if not comment]
    is_step = inspect.isfunction(f) and list(inspect.signature(f).parameters)[:3] == STEP
    return [k for k in missing if not (is_step and k in STEP or (is_step or f in ROWS.values()) and k in elsewhere)]

def commented(modules): return {k for m in modules for f in public(m).values() for k, comment in parameters(f).items() if comment}

def undocumented(module, elsewhere=()):
    "Public functions, classes and methods of a module without a docstring, and parameters of the first two without a comment"
    for name, obj in public(module).items():
        if not (obj.__doc__ or '').strip(): yield f'{name}: no docstring'
        yield from (f'{name}: {k} has no comment' for k in uncommented(obj, elsewhere))
        if not inspect.isclass(obj): continue
        yield from (f'{name}.{k}: no docstring' for k, m in methods(obj, module).items() if not (m.__doc__ or '').strip())

@pytest.mark.parametrize('name', MODULES)
def test_everything_public_is_documented(name):
    assert list(undocumented(module(name), commented(map(module, MODULES)))) == []

@pytest.mark.parametrize('name', MODULES)
def test_modules_explain_themselves(name):
    doc = module(name).__doc__ or ''
    assert len(doc.strip().splitlines()) > 3 and '\nDocs: ' in doc, 'needs exported prose and an exported example'
    assert f'`{pkg.__name__}.{name}`' in pkg.__doc__, 'the package docstring lists every module'

def test_a_missing_comment_would_be_found(tmp_path, monkeypatch):
    (tmp_path/'bare_demo.py').write_text('__all__ = ["f", "C"]\ndef f(\n    a, # said\n    b,\n): "Doc"\n'
                                         'class C:\n    "Doc"\n    def __init__(self, n, **kw): pass\n    def m(self): pass\n'
                                         '__all__.append("step")\ndef step(p, g, state, *, lr, mom): "Doc"\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert list(undocumented(importlib.import_module('bare_demo'), {'lr'})) == [
        'f: b has no comment', 'C: n has no comment', 'C.m: no docstring', 'step: mom has no comment']

# ---- workflows and commands

def workflows(root): return {p.stem: yaml.safe_load(p.read_text()) for p in sorted((root/'.github/workflows').glob('*.yml'))}

def test_workflows_have_least_permissions(root):
    writes = {}
    for name, flow in workflows(root).items():
        assert flow['permissions'] == {'contents': 'read'}, name
        for label, job in flow['jobs'].items():
            assert 'uses' in job or job['timeout-minutes'] <= 45, f'{name}: {label} has no time limit'
            if 'permissions' in job: writes[f'{name}/{label}'] = job['permissions']
    assert writes == {'docs/publish': {'pages': 'write', 'id-token': 'write'}, 'release/publish': {'id-token': 'write'}}

def test_workflows_run_what_they_should(root):
    flows = workflows(root)
    assert set(flows) == {'tests', 'docs', 'release'}
    on = {k: v[True] for k, v in flows.items()}  # YAML reads the key `on` as true
    assert {'push', 'pull_request', 'schedule', 'workflow_call'} == set(on['tests']) and on['release'] == {'push': {'tags': ['v*']}}
    assert flows['tests']['jobs']['test']['steps'][-1]['run'] == 'bash .ci/run'
    assert flows['release']['jobs']['tests']['uses'] == './.github/workflows/tests.yml'
    assert "refs/heads/main" in flows['docs']['jobs']['publish']['if'] and 'pull_request' in on['docs']

def test_the_oldest_torch_is_read_from_the_settings(root):
    step = next(s for s in workflows(root)['tests']['jobs']['test']['steps'] if 'oldest' in s.get('if', ''))
    pattern = re.search(r"sed -n '[^']*' settings.ini", step['run'])[0]
    assert re.fullmatch(r'torch==[\d.]+\n', subprocess.check_output(pattern, shell=True, cwd=root, text=True))

def test_two_lines_of_the_readme_do_everything(root):
    lines = [o for o in (root/'README.md').read_text().splitlines() if o.startswith('pip install ')]
    assert sum('pytest' in o and 'nbdev-test' in o for o in lines) == 1, 'one line installs and tests; .ci/run runs it'
    assert sum('oe-race' in o for o in lines) == 1, 'one line installs and runs the job'

def test_the_ci_script_can_run(root):
    assert os.stat(root/'.ci/run').st_mode & stat.S_IXUSR
    subprocess.check_call(['bash', '-n', root/'.ci/run'])
