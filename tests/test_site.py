"The checks of the site and of the README: they pass on this repository, and each fails on a page that is broken in just one way."
import base64
import shutil
import types

import pytest
from conftest import notebook
from nbdev.config import get_config

PNG = base64.b64encode(b'not a real picture').decode()
FRONT = {'raw': '---\ntitle: A page\noutput-file: page.html\n---\n'}
SIDEBAR = '''
website:
  sidebar:
    contents:
      - section: Explained
        contents: [index.ipynb, 01_page.ipynb]
      - section: Reference
        contents: [00_help.ipynb]
      - section: Benchmarks and tables
        contents: []
'''

@pytest.fixture
def cfg(tmp_path):
    "What the checks read of the project's settings, for a project that is not ours"
    return types.SimpleNamespace(
        doc_url='https://who.example/lib/', git_url='https://github.com/who/lib', user='who', repo='lib', branch='main',
        config_path=tmp_path, nbs_path=tmp_path/'nbs', readme_nb='index.ipynb')

@pytest.fixture
def nbs(tmp_path):
    (tmp_path/'nbs').mkdir()
    (tmp_path/'README.md').write_text('')
    return tmp_path/'nbs'

# ---- this repository

def test_pages_of_this_repository(site, root):
    cfg = get_config(root)
    nbs = cfg.nbs_path
    assert site.pages(nbs)
    # anchors of exported symbols exist only on processed pages: `.ci/site.py` checks those
    assert [*site.sidebar(nbs), *site.links(nbs, cfg, check_anchors=False), *site.alt_texts(nbs), *site.colab(nbs, cfg)] == []

def test_readme_is_the_front_page(readme): assert readme.stale() == [], 'run `python .ci/readme.py`'

def test_generated_settings_are_current(root, tmp_path, monkeypatch):
    from nbdev import quarto
    cfg = get_config(root)
    monkeypatch.setattr(quarto, 'get_config', lambda: cfg)
    old = cfg.nbs_path
    (tmp_path/'_quarto.yml').write_text('')
    monkeypatch.setitem(cfg, 'nbs_path', str(tmp_path))
    quarto.refresh_quarto_yml()
    assert (tmp_path/'nbdev.yml').read_text() == (old/'nbdev.yml').read_text(), 'run `python .ci/site.py`'

# ---- links, headings, pictures

def test_links_that_lead_somewhere(site, cfg, nbs):
    notebook(nbs/'01_page.ipynb', '# A page', '## One, two: *three* with `code`\n\ntext', '## Twice', '## Twice', '## Named {#other}',
        '[a](index.ipynb) [b](index.ipynb#part-1.5) [c](#one-two-three-with-code) [d](#twice-1) [e](#other) ![g](pic.png) '
        '<img src="pic.png" alt="g"> [f](https://elsewhere.example/x#y) [h](https://who.example/lib/page.html#twice) '
        '[i](https://who.example/lib/) [j](https://github.com/who/lib/blob/main/README.md) '
        '[k](https://colab.research.google.com/github/who/lib/blob/main/nbs/index.ipynb)',
        '`[not](a_link.ipynb)`\n```python\nd[0](nor_this.ipynb)\n# no heading\n```')
    notebook(nbs/'index.ipynb', '# Index', '## 1. Part 1.5')
    (nbs/'pic.png').write_bytes(b'.')
    assert list(site.links(nbs, cfg)) == []
    assert 'no-heading' not in site.anchors(nbs/'01_page.ipynb')

@pytest.mark.parametrize('link, wrong', [
    ('[a](02_gone.ipynb)', 'leads nowhere'),
    ('![a](gone.png)', 'leads nowhere'),
    ('<img alt="a" src="gone.png">', 'leads nowhere'),
    ('[a](https://who.example/lib/gone.html)', 'leads nowhere'),
    ('[a](https://github.com/who/lib/blob/main/GONE.md)', 'leads nowhere'),
    ('[a](https://colab.research.google.com/github/who/lib/blob/main/nbs/gone.ipynb)', 'leads nowhere'),
    ('[a](../README.md)', 'leaves the site'),
    ('[a](#three)', 'no such heading'),
    ('[a](index.ipynb#part)', 'no such heading'),
    ('[a](https://who.example/lib/page.html#gone)', 'no such heading')])
def test_links_that_lead_nowhere(site, cfg, nbs, link, wrong):
    notebook(nbs/'index.ipynb', '# Index')
    notebook(nbs/'01_page.ipynb', '# A page', '## One', f'See {link}.')
    assert [f for f in site.links(nbs, cfg) if wrong in f] == list(site.links(nbs, cfg)) != []
    notebook(nbs/'01_page.ipynb', '# A page', ('colab()', {'text/markdown': f'See {link}.'}))
    assert len(list(site.links(nbs, cfg))) == 1, 'a link in an output counts too'
    notebook(nbs/'01_page.ipynb', '# A page', ('#| output: asis\nprint(md)', f'See {link}.'), ('print(md)', f'See {link}.'))
    assert len(list(site.links(nbs, cfg))) == 1, 'and one in printed Markdown'

def test_figures_need_alt_text(site, nbs):
    figure = {'image/png': PNG, 'text/plain': '<Figure>'}
    notebook(nbs/'01_good.ipynb', ('#| fig-alt: "a falling line"\nplot()', figure), '![a line](p.png)', ('print(1)', {'text/plain': '1'}))
    assert list(site.alt_texts(nbs)) == []
    for bad in ('plot()', '#| fig-alt: ""\nplot()', '#| echo: false\nplot()'):
        notebook(nbs/'02_bad.ipynb', (bad, figure))
        assert len(list(site.alt_texts(nbs))) == 1
    for bad in ('![](p.png)', '<img src="p.png">', '<img src="p.png" alt="">'):
        notebook(nbs/'02_bad.ipynb', bad)
        assert len(list(site.alt_texts(nbs))) == 1

def test_every_page_opens_in_colab(site, cfg, nbs):
    url = 'https://colab.research.google.com/github/who/lib/blob/main/nbs/{}'
    notebook(nbs/'01_page.ipynb', ('colab_link("01_page")', {'text/markdown': f'[Open]({url.format("01_page.ipynb")})'}))
    assert list(site.colab(nbs, cfg)) == []
    notebook(nbs/'01_page.ipynb', ('colab_link("02_other")', {'text/markdown': f'[Open]({url.format("02_other.ipynb")})'}))
    assert len(list(site.colab(nbs, cfg))) == 1
    notebook(nbs/'01_page.ipynb', ('colab_link("01_page")',))
    assert len(list(site.colab(nbs, cfg))) == 1, 'a cell that was never run shows no link'

# ---- sidebar and processing

def test_sidebar(site, nbs):
    for name in ('index', '00_help', '01_page'): notebook(nbs/f'{name}.ipynb', '# A page')
    def findings(old='', new=''):
        (nbs/'sidebar.yml').write_text(SIDEBAR.replace(old, new))
        return list(site.sidebar(nbs))
    assert findings() == []
    assert 'lists 00_help.ipynb 0 times' in findings('[00_help.ipynb]', '[]')[0]
    assert 'lists 01_page.ipynb 2 times' in findings('[00_help.ipynb]', '[00_help.ipynb, 01_page.ipynb]')[0]
    assert 'which is no page' in findings('[]', '[20_race.ipynb]')[0]
    assert 'out of reading order' in findings('[index.ipynb, 01_page.ipynb]', '[01_page.ipynb, index.ipynb]')[0]
    assert 'the parts are' in findings('Reference', 'Others')[0]

def test_processed_pages(site, nbs, tmp_path):
    proc = tmp_path/'_proc'
    proc.mkdir()
    notebook(nbs/'01_page.ipynb', '# A page')
    assert 'not processed' in list(site.missing_pages(nbs, proc))[0]
    (proc/'01_page.ipynb').write_text('')
    assert 'not processed' in list(site.missing_pages(nbs, proc))[0]
    notebook(proc/'01_page.ipynb', FRONT, 'text')
    assert list(site.missing_pages(nbs, proc)) == []
    notebook(proc/'01_page.ipynb', FRONT, ('#| hide\n1+1',))
    assert '1 hidden' in list(site.missing_pages(nbs, proc))[0]
    notebook(proc/'01_page.ipynb', {'raw': FRONT['raw'].replace('A page', '')}, 'text')
    assert 'no title' in list(site.missing_pages(nbs, proc))[0]
    notebook(proc/'01_page.ipynb', {'raw': FRONT['raw'].replace('page.html', '01_page.html')}, 'text')
    assert 'no output file' in list(site.missing_pages(nbs, proc))[0]

def test_rendered_pages(site, nbs, tmp_path):
    notebook(nbs/'01_page.ipynb', '# A page')
    assert len(list(site.unrendered(nbs, tmp_path))) == 1
    (tmp_path/'page.html').write_text('<html>')
    assert list(site.unrendered(nbs, tmp_path)) == []

# ---- README

def page(readme, cfg, nbs, monkeypatch, *cells):
    monkeypatch.setattr(readme, 'get_config', lambda path: cfg)
    notebook(nbs/'index.ipynb', *cells)
    return readme.readme(nbs.parent)['README.md'].decode()

def test_readme_of_a_notebook(readme, cfg, nbs, monkeypatch):
    text = page(readme, cfg, nbs, monkeypatch, '# Lib\n\n> One line', '#| export\nWhy.', ('#| hide\nsecret()', {'text/plain': 'hidden'}),
        ('#| echo: false\nbadge()', {'text/markdown': '[next](01_sgd.ipynb)', 'text/plain': '<Markdown>'}),
        ('#| output: false\nquiet()', {'text/plain': 'noise'}), ('1 + 1', {'text/plain': '2'}),
        ('#| output: asis\nprint(table)', '| a [b](05_torch_sgd.ipynb) |\n'), ('print(3)', '3\n'),
        'See [a](04_composer.ipynb#twice), [b](#part), [c](https://x.example/y.ipynb), ![d](images/d.png), [e](../LICENSE).\n\n'
        '```bash\nls [x](y.ipynb)\n```')
    head, rest = text.split('\n\n', 1)
    assert head.startswith('<!-- Generated from nbs/index.ipynb')
    repo = 'https://github.com/who/lib'
    assert rest == ('# Lib\n\n> One line\n\nWhy.\n\n[next](https://who.example/lib/sgd.html)\n\n```python\nquiet()\n```\n\n'
        '```python\n1 + 1\n```\n\n```\n2\n```\n\n'
        '```python\nprint(table)\n```\n\n| a [b](https://who.example/lib/torch_sgd.html) |\n\n```python\nprint(3)\n```\n\n```\n3\n```\n\n'
        'See [a](https://who.example/lib/composer.html#twice), [b](#part), [c](https://x.example/y.ipynb), '
        f'![d]({repo}/raw/main/nbs/images/d.png), [e]({repo}/blob/main/LICENSE).\n\n```bash\nls [x](y.ipynb)\n```\n')

def test_readme_keeps_pictures_as_files(readme, cfg, nbs, monkeypatch):
    text = page(readme, cfg, nbs, monkeypatch, '# Lib', ('#| echo: false\n#| fig-alt: "a falling line"\nplot()', {'image/png': PNG}))
    assert '![a falling line](https://github.com/who/lib/raw/main/README_files/c1.png)' in text
    assert readme.stale(nbs.parent) == ['README.md', 'README_files/c1.png']
    readme.write(nbs.parent)
    assert readme.stale(nbs.parent) == []
    assert (nbs.parent/'README_files/c1.png').read_bytes() == base64.b64decode(PNG)

def test_a_stale_readme_is_found(readme, root, tmp_path):
    for name in ('nbs', 'pyproject.toml', 'README.md'):
        (shutil.copytree if (root/name).is_dir() else shutil.copy)(root/name, tmp_path/name)
    assert readme.stale(tmp_path) == []
    (tmp_path/'README.md').write_text((root/'README.md').read_text() + 'one more line\n')
    assert readme.stale(tmp_path) == ['README.md']
