"""What a reader of a built site would stumble over: python tools/faults.py FOLDER

Links and anchors that lead nowhere, missing files, a page without a description or too heavy, a picture without a text for
those who cannot see it."""
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LIMIT, LIMITS = 500_000, {'session9.html': 1_000_000}  # bytes of a page with its own pictures, without what all pages share
SHARED = 'site_libs/', 'search.json', 'styles.css', 'favicon.svg'


class Page(HTMLParser):
    "The anchors, references, pictures and description of a page."
    def __init__(self, path):
        super().__init__()
        self.path, self.ids, self.references, self.untold, self.description = path, set(), [], 0, ''
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs.get('id'), attrs.get('name') if tag == 'a' else None} - {None}
        self.references += [attrs[key] for key in ('href', 'src') if attrs.get(key)]
        self.untold += tag == 'img' and not (attrs.get('alt') or '').strip()
        if tag == 'meta' and attrs.get('name') == 'description': self.description = attrs.get('content') or ''


def inside(page):
    "The page's references into the site: (as written, file, anchor)."
    for reference in page.references:
        parts = urlsplit(reference)
        if parts.scheme or parts.netloc: continue
        target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
        yield reference, target / 'index.html' if target.is_dir() else target, unquote(parts.fragment)


def read(site):
    "Path -> `Page`, for every page of the site."
    return {path: Page(path) for path in sorted(site.resolve().rglob('*.html'))}


def in_site(target, site):
    "Whether it is a file that is published with the site."
    return target.is_file() and target.is_relative_to(site.resolve())


def weight(page, site):
    "Bytes of the page and the pictures that are its own."
    files = {target for _, target, _ in inside(page) if in_site(target, site) and target.suffix != '.html'}
    own = [file for file in files if not str(file.relative_to(site.resolve())).startswith(SHARED)]
    return sum(file.stat().st_size for file in [page.path, *own])


def weights(site):
    "Page name -> `weight`."
    return {path.name: weight(page, site) for path, page in read(site).items()}


def faults(site):
    "One line a fault."
    pages = read(site)
    for path, page in pages.items():
        for written, target, anchor in inside(page):
            if not in_site(target, site): yield f'{path.name}: {written} leads to no file'
            elif target in pages and anchor and anchor not in pages[target].ids: yield f'{path.name}: {written} leads to no anchor'
        heavy, limit = weight(page, site), LIMITS.get(path.name, LIMIT)
        if heavy > limit: yield f'{path.name}: {heavy:,} bytes, expected at most {limit:,}'
        if not page.description: yield f'{path.name}: no description'
        if page.untold: yield f'{path.name}: {page.untold} pictures without alt text'


if __name__ == '__main__':
    if len(sys.argv) != 2 or not any(Path(sys.argv[1]).rglob('*.html')):
        sys.exit('expected one folder with .html pages: python tools/faults.py FOLDER')
    found = list(faults(Path(sys.argv[1])))
    for fault in found: print(fault, file=sys.stderr)
    sys.exit(bool(found))
