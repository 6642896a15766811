"""Build the documentation site and check its pages: `python .ci/site.py`.

With Quarto on the PATH this is `nbdev-docs`. Without it, it is what `nbdev-proc-nbs` does short of installing Quarto: every notebook is
processed into `_proc`. Either way the processed pages are then checked: nothing missing, nothing hidden left over, the sidebar complete,
every internal link, anchor and picture there, every figure with alt text, every page with its Colab link.

Each check takes a folder of notebooks and yields its findings as sentences."""
import os, re, shutil, subprocess, sys
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from fastcore.nbio import read_nb
from nbdev.config import get_config, nbpath2html

ROOT = Path(__file__).resolve().parents[1]
PARTS = ['Explained', 'Reference', 'Benchmarks and tables']
CODE = re.compile(r'^(```+|~~~+).*?^\1[ \t]*$|`[^`\n]+`', re.M | re.S)
LINK = re.compile(r'(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)[^)]*\)')
HTML = re.compile(r'<(?:img|a)\b[^>]*?\b(?:src|href)="([^"]+)"')
HEADING = re.compile(r'^#{1,6}[ \t]+(.*?)[ \t]*$', re.M)

def joined(o): return o if isinstance(o, str) else ''.join(o)

def pages(folder):
    "The notebooks of a folder in reading order: index first, then by name"
    found = [p for p in Path(folder).glob('*.ipynb') if p.name[0] not in '_.']
    return sorted(found, key=lambda p: (p.name != 'index.ipynb', p.name))

def texts(cell):
    "The Markdown a reader sees in a cell and in its outputs, directive lines removed"
    if cell.cell_type == 'markdown': yield re.sub(r'\A(#\|.*\n?)+', '', cell.source)
    for out in cell.get('outputs', []):
        data = out.get('data', {})
        yield from (joined(data[k]) for k in ('text/markdown', 'text/html') if k in data)
        if cell.directive('output') == 'asis': yield joined(out.get('text', data.get('text/plain', '')))

def prose(page): return [CODE.sub('', t) for c in read_nb(page).cells for t in texts(c)]

def slug(title):
    "The id that Pandoc gives to a heading"
    title = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', title)
    title = re.sub(r'[^\w\s.-]', '', title).strip().lower()
    return re.sub(r'^[\W\d_]+', '', re.sub(r'\s+', '-', title)) or 'section'

def anchors(page):
    "All ids on a page: headings (repeated ones numbered), explicit `{#id}` and `id=\"...\"`"
    text = '\n\n'.join(re.sub(r'^(```+|~~~+).*?^\1[ \t]*$', '', t, flags=re.M | re.S) for c in read_nb(page).cells for t in texts(c))
    found, seen = set(re.findall(r'\{#([\w.-]+)|\bid="([^"]+)"', text)), Counter()
    ids = {i for pair in found for i in pair if i}
    for title in HEADING.findall(text):
        s = slug(re.sub(r'\s*\{[^}]*\}$', '', title))
        ids.add(f'{s}-{seen[s]}' if seen[s] else s)
        seen[s] += 1
    return ids

def locate(target, page, cfg):
    "The file that a link leads to, or None for a link that leaves the project"
    url, path = urlsplit(target), unquote(urlsplit(target).path)
    colab = f'https://colab.research.google.com/github/{cfg.user}/{cfg.repo}'
    for base in (cfg.git_url, colab):
        if m := re.match(rf'{re.escape(base)}/(?:blob|raw|tree)/{cfg.branch}/([^#?]+)', target): return cfg.config_path/m[1]
    if target.startswith(site := cfg.doc_url.rstrip('/') + '/'):
        name = target[len(site):].split('#')[0].removesuffix('.md') or 'index.html'
        return {nbpath2html(p.name).name: p for p in pages(page.parent)}.get(name, page.parent/name)
    if url.scheme or url.netloc: return None
    return page.parent/path if path else page

def missing_pages(src, proc):
    "Notebooks of `src` that are not a finished page in `proc`"
    for page in pages(src):
        done = Path(proc)/page.name
        if not done.exists() or not done.stat().st_size: yield f'{page.name}: not processed'; continue
        cells = read_nb(done).cells
        head = cells[0].source if cells and cells[0].cell_type == 'raw' else ''
        if not re.search(r'^title: \S', head, re.M): yield f'{page.name}: no title'
        if f'output-file: {nbpath2html(page.name).name}' not in head: yield f'{page.name}: no output file'
        if left := [c for c in cells if {'hide', 'default_exp'} & c.directives.keys()]: yield f'{page.name}: {len(left)} hidden cells left'

def sidebar(src):
    "What is wrong with `sidebar.yml`: parts, pages missing, unknown, repeated or out of order"
    contents = yaml.safe_load((Path(src)/'sidebar.yml').read_text())['website']['sidebar']['contents']
    if (parts := [c['section'] for c in contents]) != PARTS: yield f'sidebar.yml: the parts are {parts}'
    names, listed = [p.name for p in pages(src)], [n for c in contents for n in c['contents']]
    for n in names:
        if listed.count(n) != 1: yield f'sidebar.yml: lists {n} {listed.count(n)} times'
    for n in listed:
        if n not in names: yield f'sidebar.yml: lists {n}, which is no page'
    for c in contents:
        known = [n for n in c['contents'] if n in names]
        if known != sorted(known, key=names.index): yield f'sidebar.yml: {c["section"]} is out of reading order'

def targets(page):
    "Every address that a page links to or shows"
    return sorted({t for text in prose(page) for t in [m[2] for m in LINK.findall(text)] + HTML.findall(text)})

def links(folder, cfg, check_anchors=True):
    "Internal links and pictures that lead nowhere"
    inside = Path(folder).resolve()
    for page in pages(folder):
        for target in targets(page):
            path, url = locate(target, page, cfg), urlsplit(target)
            if path is None: continue
            if not path.exists(): yield f'{page.name}: {target} leads nowhere'
            elif not url.scheme and inside not in path.resolve().parents: yield f'{page.name}: {target} leaves the site'
            elif check_anchors and url.fragment and path.suffix == '.ipynb' and url.fragment not in anchors(path):
                yield f'{page.name}: {target} has no such heading'

def draws(cell): return any(k.startswith('image/') for o in cell.get('outputs', []) for k in o.get('data', {}))

def alt_texts(folder):
    "Figures without alt text"
    for page in pages(folder):
        for cell in filter(draws, read_nb(page).cells):
            if not cell.directive('fig-alt', '').strip('"\' '): yield f'{page.name}: cell {cell.id} draws a figure without `fig-alt`'
        for text in prose(page):
            for mark, alt, target in LINK.findall(text):
                if mark and not alt.strip(): yield f'{page.name}: {target} has no alt text'
            for tag in re.findall(r'<img\b[^>]*>', text):
                if not re.search(r'\balt="[^"]', tag): yield f'{page.name}: {tag[:60]} has no alt text'

def colab(folder, cfg):
    "Pages without the link that opens them in Colab"
    for page in pages(folder):
        url = f'https://colab.research.google.com/github/{cfg.user}/{cfg.repo}/blob/{cfg.branch}/{cfg.nbs_path.name}/{page.name}'
        shown = [t for c in read_nb(page).cells if c.cell_type == 'code' for t in texts(c)]
        if not any(f'({url})' in t or f'"{url}"' in t for t in shown): yield f'{page.name}: no Colab link'

def unrendered(src, docs):
    "Pages that Quarto left out"
    for page in pages(src):
        html = Path(docs)/nbpath2html(page.name)
        if not html.exists() or not html.stat().st_size: yield f'{page.name}: no {html.name} in {Path(docs).name}'

def build(cfg):
    "The site with Quarto, else the processed notebooks; returns whether Quarto rendered them"
    os.environ['PYTHONWARNINGS'] = 'ignore:Found cells containing imports:UserWarning'  # examples in docstrings import what they use
    if shutil.which('quarto'): return subprocess.run(['nbdev-docs'], cwd=cfg.config_path, check=True)
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    proc_nbs(force=True)

def main():
    cfg = get_config(ROOT)
    src, proc = cfg.nbs_path, cfg.config_path/'_proc'
    try: rendered = build(cfg)
    except Exception as e: sys.exit(f'{e}\n\nThe site does not build. It runs exported cells and cells that import, no others: '
                                      'keep imports in their own cells.')
    found = [*missing_pages(src, proc), *sidebar(src), *links(proc, cfg), *alt_texts(proc), *colab(proc, cfg)]
    if rendered: found += unrendered(src, cfg.doc_path)
    print(*found, sep='\n', end='\n' if found else '')
    print(f'{len(pages(src))} pages {"rendered" if rendered else "processed (no quarto on the PATH)"}, {len(found)} findings')
    return bool(found)

if __name__ == '__main__': sys.exit(main())
