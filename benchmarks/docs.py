"""Build time, page sizes, load times and search times of the documentation site, on this machine.

Measured are a build from scratch; the bytes of each page with its own images, and of the files that all pages share; in headless
Chromium, with an empty cache for each page, the time to first contentful paint; and the time from the last letter typed into the
search box to the results, which includes a pause that waits for more letters.
"""
import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread

import torch
from playwright.sync_api import sync_playwright

from eva_session9.config import hardware, versions
from eva_session9.save_load import write_atomically

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / '_docs'
sys.path.insert(0, str(ROOT / 'tools'))
from faults import SHARED, weights

TARGETS = {'build seconds': 60, 'page bytes': 500_000, 'session9 bytes': 1_000_000, 'readable ms': 1500, 'search ms': 100}
WORDS = ['GradCAM', 'find_lr', 'resume', 'reflected border', 'opacity', 'CheckpointError', 'seed', 'learning rate']
PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
ANSWER = """words => new Promise(answered => {
    const box = document.querySelector('.smalldocs-search'), input = box.querySelector('input'), start = performance.now()
    new MutationObserver((_, seen) => { seen.disconnect(); answered(performance.now() - start) })
        .observe(box.querySelector('.smalldocs-search-results'), {childList: true})
    input.value = words; input.dispatchEvent(new Event('input')) })"""


def build():
    "Seconds from no trace of an earlier build to the whole site."
    for folder in ('_proc', '_stage', '_docs'): shutil.rmtree(ROOT / folder, ignore_errors=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, 'tools/docs.py'], cwd=ROOT, check=True)
    return round(time.perf_counter() - start, 1)


def shared():
    "Bytes of all that pages have in common: themes, icons, scripts, the index of the search."
    return sum(file.stat().st_size for file in SITE.rglob('*') if file.is_file() and str(file.relative_to(SITE)).startswith(SHARED))


def readable(browser, address):
    "Milliseconds until there is text to read, with an empty cache."
    context = browser.new_context(viewport={'width': 1280, 'height': 800})
    page = context.new_page()
    page.goto(address)
    painted = page.wait_for_function(PAINTED).json_value()
    context.close()
    return round(painted)


def answers(browser, home):
    "Milliseconds to the answer for each of `WORDS`; the index is loaded before, as it is when the box is entered."
    page = browser.new_page(viewport={'width': 1280, 'height': 800})
    page.goto(f'{home}/index.html')
    page.evaluate(ANSWER, 'warm')
    return {words: round(page.evaluate(ANSWER, words)) for words in WORDS}


def measure(repeats):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=SITE)) as server, sync_playwright() as playwright:
        Thread(target=server.serve_forever, daemon=True).start()
        home = f'http://127.0.0.1:{server.server_port}'
        browser = playwright.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
        readable(browser, f'{home}/index.html')
        pages = {path.name: statistics.median(readable(browser, f'{home}/{path.name}') for _ in range(repeats))
                 for path in sorted(SITE.glob('*.html'))}
        found = {'readable ms': pages, 'search ms': answers(browser, home)}
        server.shutdown()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=3, help='loads of each page, of which the median is reported (default 3)')
    parser.add_argument('--out', type=Path, help='also write the result to this .json file, such as results/docs.json')
    args, start = parser.parse_args(), time.perf_counter()
    found = {'build seconds': build(), 'page bytes': weights(SITE), 'shared bytes': shared(), **measure(args.repeats)}
    result = {**found, 'targets': TARGETS, 'hardware': hardware(torch.device('cpu')),
              'versions': {**versions(), **{name: version(name) for name in ('nbdev', 'smalldocs')}},
              'seconds': round(time.perf_counter() - start, 1), 'command': f'python benchmarks/docs.py --repeats {args.repeats}'}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out: write_atomically(args.out, (text + '\n').encode())


if __name__ == '__main__': main()
