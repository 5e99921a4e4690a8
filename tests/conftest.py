"Chromium, for the tests that read pages in it."
import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@pytest.fixture(scope='module')
def browser():
    "Headless Chromium, without a way to anything but this machine."
    if CHROMIUM is None: pytest.skip('Chromium is not installed: apt-get install chromium')
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed: pip install playwright')
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=[
            '--no-sandbox', '--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1'])
        yield chromium
        chromium.close()
