"""Build the documentation site and check its pages: `python .ci/site.py`.

With Quarto on the PATH this is `nbdev-docs`. Without it, it is what `nbdev-proc-nbs`
does short of installing Quarto: every notebook is processed into `_proc`. Either way
the processed pages are then checked: nothing missing, nothing hidden left over, the
sidebar complete, every internal link, anchor and picture there, every figure with alt
text, every page with its Colab link.

Each check takes a folder of notebooks and yields its findings as sentences."""
import os, re, shutil, subprocess, sys
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from fastcore.nbio import read_nb
from nbdev.config import get_config, nbpath2html

ROOT = Path(__file__).resolve().parents[1]
COLAB = 'https://colab.research.google.com/github'
FENCE = re.compile(r'^(```+|~~~+).*?^\1[ \t]*$', re.M | re.S)
CODE = re.compile(FENCE.pattern + r'|`[^`\n]+`', re.M | re.S)
LINK = re.compile(r'(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)[^)]*\)')
HTML = re.compile(r'<(?:img|a)\b[^>]*?\b(?:src|href)="([^"]+)"')
HEADING = re.compile(r'^#{1,6}[ \t]+(.*?)[ \t]*$', re.M)

# ---- what a page holds

def joined(text): return text if isinstance(text, str) else ''.join(text)

def pages(folder):
    "The notebooks of a folder in reading order: index first, then by name"
    found = [p for p in Path(folder).glob('*.ipynb') if p.name[0] not in '_.']
    return sorted(found, key=lambda p: (p.name != 'index.ipynb', p.name))

def texts(cell):
    """The Markdown a reader sees in a cell and in its outputs,
    directive lines removed"""
    if cell.cell_type == 'markdown': yield re.sub(r'\A(#\|.*\n?)+', '', cell.source)
    for out in cell.get('outputs', []):
        data = out.get('data', {})
        for kind in ('text/markdown', 'text/html'):
            if kind in data: yield joined(data[kind])
        if cell.directive('output') == 'asis':
            yield joined(out.get('text', data.get('text/plain', '')))

def page_texts(page):
    for cell in read_nb(page).cells: yield from texts(cell)

def prose(page):
    "The texts of a page without code"
    for text in page_texts(page): yield CODE.sub('', text)

def slug(title):
    "The id that Pandoc gives to a heading"
    title = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', title)
    title = re.sub(r'[^\w\s.-]', '', title).strip().lower()
    return re.sub(r'^[\W\d_]+', '', re.sub(r'\s+', '-', title)) or 'section'

def anchors(page):
    """All ids on a page: headings (repeated ones numbered), explicit `{#id}` and
    `id=\"...\"`"""
    text = '\n\n'.join(FENCE.sub('', text) for text in page_texts(page))
    ids = {*re.findall(r'\{#([\w.-]+)', text), *re.findall(r'\bid="([^"]+)"', text)}
    seen = Counter()
    for title in HEADING.findall(text):
        name = slug(re.sub(r'\s*\{[^}]*\}$', '', title))
        ids.add(f'{name}-{seen[name]}' if seen[name] else name)
        seen[name] += 1
    return ids

def targets(page):
    "Every address that a page links to or shows"
    found = set()
    for text in prose(page):
        found.update(HTML.findall(text))
        for mark, label, target in LINK.findall(text): found.add(target)
    return sorted(found)

def locate(target, page, cfg):
    "The file that a link leads to, or None for a link that leaves the project"
    for base in (cfg.git_url, f'{COLAB}/{cfg.user}/{cfg.repo}'):
        pattern = rf'{re.escape(base)}/(?:blob|raw|tree)/{cfg.branch}/([^#?]+)'
        if match := re.match(pattern, target): return cfg.config_path/match[1]
    site = cfg.doc_url.rstrip('/') + '/'
    if target.startswith(site):
        name = target.removeprefix(site).split('#')[0].removesuffix('.md')
        name = name or 'index.html'
        for other in pages(page.parent):
            if nbpath2html(other.name).name == name: return other
        return page.parent/name
    url = urlsplit(target)
    if url.scheme or url.netloc: return None
    return page.parent/unquote(url.path) if url.path else page

# ---- the checks

def missing_pages(src, proc):
    "Notebooks of `src` that are not a finished page in `proc`"
    for page in pages(src):
        done = Path(proc)/page.name
        if not done.exists() or not done.stat().st_size:
            yield f'{page.name}: not processed'
            continue
        cells = read_nb(done).cells
        head = cells[0].source if cells and cells[0].cell_type == 'raw' else ''
        if not re.search(r'^title: \S', head, re.M): yield f'{page.name}: no title'
        if f'output-file: {nbpath2html(page.name).name}' not in head:
            yield f'{page.name}: no output file'
        left = [c for c in cells if {'hide', 'default_exp'} & c.directives.keys()]
        if left: yield f'{page.name}: {len(left)} hidden cells left'

# ---- one order: that of the file names

def title(page):
    "The first heading of a page"
    return read_nb(page).cells[0].source.split('\n')[0].removeprefix('# ')

def sections(src):
    "The parts of `sidebar.yml`, by name; pages that stand before them have no name"
    settings = yaml.safe_load((Path(src)/'sidebar.yml').read_text())
    found = {}
    for part in settings['website']['sidebar']['contents']:
        if isinstance(part, str): found.setdefault('', []).append(part)
        else: found[part['section']] = part['contents']
    return found

def sidebar(src):
    """What is wrong with `sidebar.yml`: it lists every page once, in the order of the
    numbers, and the first digit of a number is the section"""
    names, listed = [page.name for page in pages(src)], []
    for section, contents in sections(src).items():
        listed.extend(contents)
        digits = {name[0] for name in contents if name != 'index.ipynb'}
        if len(digits) > 1:
            yield f'sidebar.yml: {section} has pages of the numbers {sorted(digits)}'
    for name in names:
        times = listed.count(name)
        if times != 1: yield f'sidebar.yml: lists {name} {times} times'
    for name in listed:
        if name not in names: yield f'sidebar.yml: lists {name}, which is no page'
    known = [name for name in listed if name in names]
    if known != sorted(known, key=names.index):
        yield 'sidebar.yml: the pages are out of reading order'

def numbers(src):
    "Pages whose names do not begin with two digits of their own, or end otherwise"
    seen = Counter(page.name[:2] for page in pages(src))
    for page in pages(src):
        if page.name == 'index.ipynb': continue
        if not re.fullmatch(r'\d\d_[a-z_]+\.ipynb', page.name):
            yield f'{page.name}: must be two digits and a name'
        elif seen[page.name[:2]] > 1:
            yield f'{page.name}: has the number of another page'

def modules(src):
    "Pages that bear another name than the module they export"
    for page in pages(src):
        for cell in read_nb(page).cells:
            module = cell.directive('default_exp', '')
            if module and module.split('.')[-1] != page.stem[3:]:
                yield f'{page.name}: exports {module}'

NEXT = re.compile(r'\bNext: \[([^\]]*)\]\(([^)]*)\)')

def next_pages(src):
    "Pages whose last words lead to another page than the next one"
    names = [page.name for page in pages(src)]
    following = dict(zip(names, names[1:]))
    for page in pages(src):
        for text, target in NEXT.findall('\n'.join(prose(page))):
            if target != following.get(page.name):
                yield f'{page.name}: {target} is not the next page'
            elif text != title(page.parent/target):
                yield f'{page.name}: {target} has another title than {text}'

ROW = re.compile(r'^\| \[([^\]]*)\]\((\d[^)]*\.ipynb)\)', re.M)

def front_page(src):
    "What is wrong with the front page: its tables list all pages, in order, by title"
    front = Path(src)/'index.ipynb'
    rows = ROW.findall('\n'.join(prose(front)))
    wanted = [(title(page), page.name) for page in pages(src) if page != front]
    for row in wanted:
        if row not in rows: yield f'index.ipynb: has no row of {row[1]} with its title'
    for row in rows:
        if row not in wanted: yield f'index.ipynb: {row[1]} is not called {row[0]}'
    if sorted(rows) == sorted(wanted) and rows != wanted:
        yield 'index.ipynb: the pages are out of reading order'

def order(src):
    "Everything that does not follow the one order"
    for check in (numbers, modules, sidebar, next_pages, front_page):
        yield from check(src)

def links(folder, cfg, check_anchors=True):
    "Internal links and pictures that lead nowhere"
    inside = Path(folder).resolve()
    for page in pages(folder):
        for target in targets(page):
            path, url = locate(target, page, cfg), urlsplit(target)
            if path is None: continue
            if not path.exists():
                yield f'{page.name}: {target} leads nowhere'
            elif not url.scheme and inside not in path.resolve().parents:
                yield f'{page.name}: {target} leaves the site'
            elif check_anchors and url.fragment and path.suffix == '.ipynb':
                if url.fragment not in anchors(path):
                    yield f'{page.name}: {target} has no such heading'

def draws(cell):
    for out in cell.get('outputs', []):
        for kind in out.get('data', {}):
            if kind.startswith('image/'): return True
    return False

def alt_texts(folder):
    "Figures without alt text"
    for page in pages(folder):
        for cell in read_nb(page).cells:
            if draws(cell) and not cell.directive('fig-alt', '').strip('"\' '):
                yield f'{page.name}: cell {cell.id} draws a figure without `fig-alt`'
        for text in prose(page):
            for mark, alt, target in LINK.findall(text):
                if mark and not alt.strip():
                    yield f'{page.name}: {target} has no alt text'
            for tag in re.findall(r'<img\b[^>]*>', text):
                if not re.search(r'\balt="[^"]', tag):
                    yield f'{page.name}: {tag[:60]} has no alt text'

def colab(folder, cfg):
    "Pages without the link that opens them in Colab"
    base = f'{COLAB}/{cfg.user}/{cfg.repo}/blob/{cfg.branch}/{cfg.nbs_path.name}'
    for page in pages(folder):
        shown = ''
        for cell in read_nb(page).cells:
            if cell.cell_type == 'code': shown += '\n'.join(texts(cell))
        url = f'{base}/{page.name}'
        if f'({url})' not in shown and f'"{url}"' not in shown:
            yield f'{page.name}: no Colab link'

def unrendered(src, docs):
    "Pages that Quarto left out"
    for page in pages(src):
        html = Path(docs)/nbpath2html(page.name)
        if not html.exists() or not html.stat().st_size:
            yield f'{page.name}: no {html.name} in {Path(docs).name}'

# ---- building

def build(cfg, quarto):
    "The site with Quarto, else the processed notebooks"
    # examples in docstrings import what they use
    os.environ['PYTHONWARNINGS'] = 'ignore:Found cells containing imports:UserWarning'
    if quarto:
        subprocess.run(['nbdev-docs'], cwd=cfg.config_path, check=True)
        return
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    proc_nbs(force=True)

def main():
    cfg = get_config(ROOT)
    src, proc = cfg.nbs_path, cfg.config_path/'_proc'
    quarto = shutil.which('quarto') is not None
    try: build(cfg, quarto)
    except Exception as e:
        sys.exit(f'{e}\n\nThe site does not build. It runs exported cells and cells '
                 'that import, no others: keep imports in their own cells.')
    found = [*missing_pages(src, proc), *order(src), *links(proc, cfg),
             *alt_texts(proc), *colab(proc, cfg)]
    if quarto: found.extend(unrendered(src, cfg.doc_path))
    for finding in found: print(finding)
    made = 'rendered' if quarto else 'processed (no quarto on the PATH)'
    print(f'{len(pages(src))} pages {made}, {len(found)} findings')
    sys.exit(1 if found else 0)

if __name__ == '__main__': main()
