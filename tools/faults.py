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
        self.ids |= {attrs.get('id'), attrs.get('name')} - {None}
        self.references += [attrs[key] for key in ('href', 'src') if attrs.get(key)]
        self.untold += tag == 'img' and not (attrs.get('alt') or '').strip()
        if tag == 'meta' and attrs.get('name') == 'description': self.description = attrs.get('content') or ''


def inside(page):
    "The page's references into the site: (as written, path, anchor)."
    for reference in page.references:
        parts = urlsplit(reference)
        if not parts.scheme and not parts.netloc: yield reference, unquote(parts.path), unquote(parts.fragment)


def faults(site):
    "One line a fault."
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob('*.html'))}
    for path, page in pages.items():
        own = {path}
        for written, to, anchor in inside(page):
            target = (path.parent / to).resolve() if to else path
            if target.is_dir(): target /= 'index.html'
            if not target.is_file(): yield f'{path.name}: {written} leads to no file'
            elif target in pages and anchor and anchor not in pages[target].ids: yield f'{path.name}: {written} leads to no anchor'
            elif target not in pages and not to.startswith(SHARED): own.add(target)
        weight, limit = sum(file.stat().st_size for file in own), LIMITS.get(path.name, LIMIT)
        if weight > limit: yield f'{path.name}: {weight:,} bytes, expected at most {limit:,}'
        if not page.description: yield f'{path.name}: no description'
        if page.untold: yield f'{path.name}: {page.untold} pictures without alt text'


if __name__ == '__main__':
    found = list(faults(Path(sys.argv[1])))
    for fault in found: print(fault, file=sys.stderr)
    sys.exit(bool(found))
