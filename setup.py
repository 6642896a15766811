"Read the packaging facts of `settings.ini`; what is static stands in `pyproject.toml`."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

here = Path(__file__).parent
cfg = ConfigParser(delimiters=['='])
cfg.read(here/'settings.ini', encoding='utf-8')

def lines(section, key): return [o for o in cfg[section][key].splitlines() if o.strip()]
def own(section): return [k for k in cfg[section] if k not in cfg.defaults()]

meta = cfg.defaults()

setup(
    author=meta['author'],
    license=meta['license'],
    keywords=meta['keywords'].split(),
    classifiers=lines('DEFAULT', 'classifiers'),
    install_requires=lines('requirements', 'runtime'),
    extras_require={k: lines('extras', k) for k in own('extras')},
    entry_points={
        'console_scripts': [f'{k} = {cfg["commands"][k]}' for k in own('commands')],
        'nbdev': ['optimizers_explained = optimizers_explained._modidx:d']},
)
