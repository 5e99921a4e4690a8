"The doc site: every kind of fault is found, and the built pages are read in headless Chromium on a phone and on a desk."
import re
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools'))
from faults import faults

WHOLE = '''<meta name="description" content="a page"><h2 id="here">Here</h2><a href="#here">here</a>
    <a href="other.html">other</a><img src="dot.png" alt="a dot"><a href="https://example.org/none.html">elsewhere</a>'''


# Faults

@pytest.fixture
def site(tmp_path):
    "A site of two pages without a fault, and a file that is beside it."
    folder = tmp_path / 'site'
    folder.mkdir()
    for file in (folder / 'dot.png', tmp_path / 'outside.png'): file.write_bytes(b'a dot')
    for name in ('index.html', 'other.html'): (folder / name).write_text(WHOLE)
    return folder


def test_a_whole_site_has_no_fault(site): assert list(faults(site)) == []


@pytest.mark.parametrize('old, new, said', [
    ('other.html', 'missing.html', 'missing.html leads to no file'),
    ('#here">here', '#there">here', '#there leads to no anchor'),
    ('#here">here', '#description">here', '#description leads to no anchor'),
    ('other.html', 'other.html#there', 'other.html#there leads to no anchor'),
    ('dot.png', 'dash.png', 'dash.png leads to no file'),
    ('dot.png', '../outside.png', '../outside.png leads to no file'),
    ('alt="a dot"', 'alt=""', '1 pictures without alt text'),
    ('content="a page"', 'content=""', 'no description')])
def test_a_fault_is_found(site, old, new, said):
    (site / 'index.html').write_text(WHOLE.replace(old, new))
    assert list(faults(site)) == [f'index.html: {said}']


def test_a_heavy_page_is_found(site):
    (site / 'dot.png').write_bytes(bytes(500_000))
    assert [*faults(site)][0].startswith('index.html: 500,')
    (site / 'dot.png').write_bytes(bytes(400_000))
    assert list(faults(site)) == []


# Browser

@pytest.fixture(scope='module')
def home():
    "The address of the built site."
    built = subprocess.run([sys.executable, ROOT / 'tools/docs.py'], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=ROOT / '_docs')) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def watched(page, home):
    "A list that fills with what goes wrong: errors in the console, failed or foreign requests."
    wrong = []
    page.on('console', lambda message: message.type == 'error' and wrong.append(message.text))
    page.on('pageerror', lambda error: wrong.append(str(error)))
    page.on('request', lambda request: request.url.startswith((home, 'data:')) or wrong.append(request.url))
    page.on('response', lambda response: response.ok or response.status == 304 or wrong.append(f'{response.status} {response.url}'))
    return wrong


WIDER = '''() => [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
    .slice(0, 3).map(e => e.outerHTML.slice(0, 80))'''


@pytest.mark.parametrize('width', [375, 1280])
def test_every_page_fits_and_is_quiet(home, browser, width):
    page = browser.new_page(viewport={'width': width, 'height': 800})
    wrong = watched(page, home)
    for path in sorted((ROOT / '_docs').glob('*.html')):
        page.goto(f'{home}/{path.name}')
        scrolls = page.evaluate('document.documentElement.scrollWidth > document.documentElement.clientWidth')
        assert not scrolls, f'{path.name} scrolls sideways at {width} pixels: {page.evaluate(WIDER)}'
        assert wrong == [], path.name
    page.close()


@pytest.mark.parametrize('words, where', [
    ('GradCAM', 'gradcam.cam.html'), ('find_lr', 'lr_finder.html'), ('reflected border', 'preprocessing.html')])
def test_search_finds_names_and_prose(home, browser, words, where):
    page = browser.new_page(viewport={'width': 1280, 'height': 800})
    wrong = watched(page, home)
    page.goto(f'{home}/index.html')
    page.keyboard.press('/')
    page.keyboard.type(words)
    page.locator(f'a.search-result[href*="{where}"]:visible', has_text=words.split()[0]).first.wait_for(timeout=30_000)
    assert wrong == []
    page.close()


def test_signatures_stand_in_the_order_of_the_module(home):
    page = urlopen(f'{home}/models.resnet.html').read().decode()
    headings = re.findall(r'<h3 id="(\w+)"', page)
    assert headings == ['basicblock', 'bottleneck', 'resnet', 'resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'make_model']
    assert '__main__' not in page


@pytest.mark.parametrize('page, shown', [
    ('lr_finder', 'lrcurve.lr: float  # a property'), ('engine', 'class Scores(tuple):'), ('preprocessing', 'class Keyed:')])
def test_what_is_no_call_is_not_shown_as_one(home, page, shown):
    text = urlopen(f'{home}/{page}.html').read().decode()
    assert shown in re.sub('<[^>]+>', '', text)
