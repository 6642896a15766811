"""The checks of the site and of the README: they pass on this repository, and each
fails on a page that is broken in just one way."""
import base64
import shutil
import types

import pytest
from conftest import notebook
from nbdev.config import get_config

PNG = base64.b64encode(b'not a real picture').decode()
FRONT = '---\ntitle: A page\noutput-file: page.html\n---\n'
COLAB = 'https://colab.research.google.com/github/who/lib/blob/main/nbs'
REPO = 'https://github.com/who/lib'
SIDEBAR = '''
website:
  sidebar:
    contents:
      - index.ipynb
      - section: Learn
        contents: [00_help.ipynb, 01_page.ipynb]
      - section: Race
        contents: [60_race.ipynb]
'''

@pytest.fixture
def cfg(tmp_path):
    "What the checks read of the project's settings, for a project that is not ours"
    return types.SimpleNamespace(
        doc_url='https://who.example/lib/', git_url=REPO,
        user='who', repo='lib', branch='main',
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
    assert list(site.order(nbs)) == []
    # anchors of exported symbols are on processed pages: `.ci/site.py` checks those
    assert list(site.links(nbs, cfg, check_anchors=False)) == []
    assert list(site.alt_texts(nbs)) == []
    assert list(site.colab(nbs, cfg)) == []

def test_readme_is_the_front_page(readme):
    assert readme.stale() == [], 'run `python .ci/readme.py`'

def test_generated_settings_are_current(root, tmp_path, monkeypatch):
    from nbdev import quarto
    cfg = get_config(root)
    monkeypatch.setattr(quarto, 'get_config', lambda: cfg)
    stored = (cfg.nbs_path/'nbdev.yml').read_text()
    (tmp_path/'_quarto.yml').write_text('')
    monkeypatch.setitem(cfg, 'nbs_path', str(tmp_path))
    quarto.refresh_quarto_yml()
    fresh = (tmp_path/'nbdev.yml').read_text()
    assert fresh == stored, 'run `python .ci/site.py`'

# ---- links, headings, pictures

GOOD_LINKS = f'''
[page](index.ipynb)
[heading](index.ipynb#part-1.5)
[own heading](#one-two-three-with-code)
[second of its name](#twice-1)
[named](#other)
![picture](pic.png)
<img src="pic.png" alt="picture">
[elsewhere](https://elsewhere.example/x#y)
[site](https://who.example/lib/page.html#twice)
[front](https://who.example/lib/)
[repository]({REPO}/blob/main/README.md)
[colab]({COLAB}/index.ipynb)
'''
NO_LINKS = '`[not](a_link.ipynb)`\n```python\nd[0](nor_this.ipynb)\n# no heading\n```'

def test_links_that_lead_somewhere(site, cfg, nbs):
    notebook(nbs/'01_page.ipynb', '# A page',
             '## One, two: *three* with `code`\n\ntext',
             '## Twice', '## Twice', '## Named {#other}', GOOD_LINKS, NO_LINKS)
    notebook(nbs/'index.ipynb', '# Index', '## 1. Part 1.5')
    (nbs/'pic.png').write_bytes(b'.')
    assert list(site.links(nbs, cfg)) == []
    assert 'no-heading' not in site.anchors(nbs/'01_page.ipynb')

@pytest.mark.parametrize('link, wrong', [
    ('[a](02_gone.ipynb)', 'leads nowhere'),
    ('![a](gone.png)', 'leads nowhere'),
    ('<img alt="a" src="gone.png">', 'leads nowhere'),
    ('[a](https://who.example/lib/gone.html)', 'leads nowhere'),
    (f'[a]({REPO}/blob/main/GONE.md)', 'leads nowhere'),
    (f'[a]({COLAB}/gone.ipynb)', 'leads nowhere'),
    ('[a](../README.md)', 'leaves the site'),
    ('[a](#three)', 'no such heading'),
    ('[a](index.ipynb#part)', 'no such heading'),
    ('[a](https://who.example/lib/page.html#gone)', 'no such heading')])
def test_links_that_lead_nowhere(site, cfg, nbs, link, wrong):
    text = f'See {link}.'
    notebook(nbs/'index.ipynb', '# Index')
    notebook(nbs/'01_page.ipynb', '# A page', '## One', text)
    found = list(site.links(nbs, cfg))
    assert found
    for finding in found: assert wrong in finding
    notebook(nbs/'01_page.ipynb', '# A page', ('colab()', {'text/markdown': text}))
    assert len(list(site.links(nbs, cfg))) == 1, 'a link in an output counts too'
    notebook(nbs/'01_page.ipynb', '# A page',
             ('#| output: asis\nprint(md)', text), ('print(md)', text))
    assert len(list(site.links(nbs, cfg))) == 1, 'and one in printed Markdown'

def test_figures_need_alt_text(site, nbs):
    figure = {'image/png': PNG, 'text/plain': '<Figure>'}
    notebook(nbs/'01_good.ipynb',
             ('#| fig-alt: "a falling line"\nplot()', figure),
             '![a line](p.png)',
             ('print(1)', {'text/plain': '1'}))
    assert list(site.alt_texts(nbs)) == []
    for source in ('plot()', '#| fig-alt: ""\nplot()', '#| echo: false\nplot()'):
        notebook(nbs/'02_bad.ipynb', (source, figure))
        assert len(list(site.alt_texts(nbs))) == 1
    for text in ('![](p.png)', '<img src="p.png">', '<img src="p.png" alt="">'):
        notebook(nbs/'02_bad.ipynb', text)
        assert len(list(site.alt_texts(nbs))) == 1

def test_every_page_opens_in_colab(site, cfg, nbs):
    def findings(name):
        link = {'text/markdown': f'[Open]({COLAB}/{name}.ipynb)'}
        notebook(nbs/'01_page.ipynb', (f'colab_link("{name}")', link))
        return list(site.colab(nbs, cfg))
    assert findings('01_page') == []
    assert len(findings('02_other')) == 1
    notebook(nbs/'01_page.ipynb', ('colab_link("01_page")',))
    assert len(list(site.colab(nbs, cfg))) == 1, 'a cell never run shows no link'

# ---- sidebar and processing

TABLE = """
| page | the question |
|---|---|
| [Help](00_help.ipynb) | What? |
| [A page](01_page.ipynb) | Why? |
| [The race](60_race.ipynb) | Who? |
"""

def in_order(nbs, table=TABLE, sidebar=SIDEBAR, module='race', words='The end.'):
    "A site of four pages, with one thing changed"
    notebook(nbs/'index.ipynb', '# Index', table)
    notebook(nbs/'00_help.ipynb', '# Help', 'Next: [A page](01_page.ipynb).')
    notebook(nbs/'01_page.ipynb', '# A page', words)
    notebook(nbs/'60_race.ipynb', '# The race', (f'#| default_exp {module}',))
    (nbs/'sidebar.yml').write_text(sidebar)

def test_pages_in_order(site, nbs):
    in_order(nbs, words='Next: [The race](60_race.ipynb). In a script:')
    assert list(site.order(nbs)) == []

@pytest.mark.parametrize('old, new, wrong', [
    ('00_help.ipynb, ', '', 'lists 00_help.ipynb 0 times'),
    ('[60_race.ipynb]', '[60_race.ipynb, 60_race.ipynb]', 'lists 60_race.ipynb 2'),
    ('[60_race.ipynb]', '[60_race.ipynb, 61_gone.ipynb]', 'which is no page'),
    ('[00_help.ipynb, 01_page.ipynb]', '[01_page.ipynb, 00_help.ipynb]', 'of reading'),
    ('01_page.ipynb]', '01_page.ipynb, 60_race.ipynb]', "of the numbers ['0', '6']")])
def test_sidebar(site, nbs, old, new, wrong):
    in_order(nbs, sidebar=SIDEBAR.replace(old, new))
    assert any(wrong in finding for finding in site.order(nbs))

@pytest.mark.parametrize('old, new, wrong', [
    ('| [A page](01_page.ipynb) | Why? |', '', 'has no row of 01_page.ipynb'),
    ('[Help]', '[Help yourself]', '00_help.ipynb is not called Help yourself')])
def test_front_page(site, nbs, old, new, wrong):
    in_order(nbs, table=TABLE.replace(old, new))
    assert any(wrong in finding for finding in site.order(nbs))

def test_front_page_out_of_order(site, nbs):
    *head, first, second, last = TABLE.strip().split('\n')
    in_order(nbs, table='\n'.join([*head, second, first, last]))
    assert list(site.order(nbs)) == ['index.ipynb: the pages are out of reading order']

def test_names_and_next_pages(site, nbs):
    in_order(nbs, words='Next: [Help](00_help.ipynb).')
    found, = site.order(nbs)
    assert found == '01_page.ipynb: 00_help.ipynb is not the next page'
    in_order(nbs, words='Next: [a race](60_race.ipynb).')
    found, = site.order(nbs)
    assert found == '01_page.ipynb: 60_race.ipynb has another title than a race'
    in_order(nbs, module='speed.runners')
    assert list(site.order(nbs)) == ['60_race.ipynb: exports speed.runners']
    in_order(nbs)
    notebook(nbs/'01_two.ipynb', '# Two')
    assert '01_two.ipynb: has the number of another page' in list(site.order(nbs))
    notebook(nbs/'6a_odd.ipynb', '# Odd')
    assert '6a_odd.ipynb: must be two digits and a name' in list(site.order(nbs))

def test_processed_pages(site, nbs, tmp_path):
    proc = tmp_path/'_proc'
    proc.mkdir()
    notebook(nbs/'01_page.ipynb', '# A page')
    def findings(*cells):
        notebook(proc/'01_page.ipynb', *cells)
        return list(site.missing_pages(nbs, proc))
    assert 'not processed' in list(site.missing_pages(nbs, proc))[0]
    (proc/'01_page.ipynb').write_text('')
    assert 'not processed' in list(site.missing_pages(nbs, proc))[0]
    assert findings({'raw': FRONT}, 'text') == []
    assert '1 hidden' in findings({'raw': FRONT}, ('#| hide\n1+1',))[0]
    assert 'no title' in findings({'raw': FRONT.replace('A page', '')}, 'text')[0]
    other = FRONT.replace('page.html', '01_page.html')
    assert 'no output file' in findings({'raw': other}, 'text')[0]

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

LAST_CELL = '''See [a](10_composer.ipynb#twice), [b](#part),
[c](https://x.example/y.ipynb),
![d](images/d.png),
[e](../LICENSE).

```bash
ls [x](y.ipynb)
```'''

EXPECTED = '''# Lib

> One line

Why.

[next](https://who.example/lib/basic.html)

```python
quiet()
```

```python
1 + 1
```

```
2
```

```python
print(table)
```

| a [b](https://who.example/lib/torch_sgd.html) |

```python
print(3)
```

```
3
```

See [a](https://who.example/lib/composer.html#twice), [b](#part),
[c](https://x.example/y.ipynb),
![d](https://github.com/who/lib/raw/main/nbs/images/d.png),
[e](https://github.com/who/lib/blob/main/LICENSE).

```bash
ls [x](y.ipynb)
```
'''

def test_readme_of_a_notebook(readme, cfg, nbs, monkeypatch):
    badge = {'text/markdown': '[next](01_basic.ipynb)', 'text/plain': '<Markdown>'}
    text = page(
        readme, cfg, nbs, monkeypatch,
        '# Lib\n\n> One line',
        '#| export\nWhy.',
        ('#| hide\nsecret()', {'text/plain': 'hidden'}),
        ('#| echo: false\nbadge()', badge),
        ('#| output: false\nquiet()', {'text/plain': 'noise'}),
        ('1 + 1', {'text/plain': '2'}),
        ('#| output: asis\nprint(table)', '| a [b](11_torch_sgd.ipynb) |\n'),
        ('print(3)', '3\n'),
        LAST_CELL)
    head, rest = text.split('\n\n', 1)
    assert head.startswith('<!-- Generated from nbs/index.ipynb')
    assert rest == EXPECTED

def test_readme_keeps_pictures_as_files(readme, cfg, nbs, monkeypatch):
    plot = '#| echo: false\n#| fig-alt: "a falling line"\nplot()'
    text = page(readme, cfg, nbs, monkeypatch, '# Lib', (plot, {'image/png': PNG}))
    assert f'![a falling line]({REPO}/raw/main/README_files/c1.png)' in text
    assert readme.stale(nbs.parent) == ['README.md', 'README_files/c1.png']
    readme.write(nbs.parent)
    assert readme.stale(nbs.parent) == []
    picture = nbs.parent/'README_files/c1.png'
    assert picture.read_bytes() == base64.b64decode(PNG)

def test_a_stale_readme_is_found(readme, root, tmp_path):
    shutil.copytree(root/'nbs', tmp_path/'nbs')
    for name in ('pyproject.toml', 'README.md'): shutil.copy(root/name, tmp_path/name)
    assert readme.stale(tmp_path) == []
    written = (tmp_path/'README.md').read_text()
    (tmp_path/'README.md').write_text(written + 'one more line\n')
    assert readme.stale(tmp_path) == ['README.md']
