import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

def load(name):
    "The script `.ci/NAME.py` as a module"
    spec = importlib.util.spec_from_file_location(f'ci_{name}', ROOT/'.ci'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def notebook(path, *cells):
    """Write a notebook: a string is a Markdown cell, `(source, *outputs)` a code cell, `{'raw': text}` a raw cell;
    an output that is a string was printed"""
    def cell(i, c):
        if isinstance(c, dict): return dict(cell_type='raw', id=f'c{i}', metadata={}, source=c['raw'])
        if isinstance(c, str): return dict(cell_type='markdown', id=f'c{i}', metadata={}, source=c)
        outs = [dict(output_type='stream', name='stdout', text=o) if isinstance(o, str) else
                dict(output_type='display_data', metadata={}, data=o) for o in c[1:]]
        return dict(cell_type='code', id=f'c{i}', metadata={}, source=c[0], execution_count=None, outputs=outs)
    meta = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    nb = dict(cells=[cell(i, c) for i, c in enumerate(cells)], metadata=meta, nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(nb))
    return path

@pytest.fixture(scope='session')
def root(): return ROOT
@pytest.fixture(scope='session')
def site(): return load('site')
@pytest.fixture(scope='session')
def readme(): return load('readme')
