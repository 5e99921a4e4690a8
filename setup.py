"Build eva_session9 from settings.ini, the one source of its metadata."
import re, tomllib
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here / 'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
name = cfg['lib_name']

# What nbdev reads elsewhere must say the same.
project = tomllib.loads((here / 'pyproject.toml').read_text(encoding='utf-8'))['project']
init = (here / name / '__init__.py').read_text(encoding='utf-8')
repeated = {
    'lib_name': project['name'], 'description': project['description'],
    'version': re.search(r"__version__\s*=\s*['\"](.+?)['\"]", init)[1],
    'git_url': project['urls']['Repository'], 'doc_host + doc_baseurl': project['urls']['Documentation']}
for key, found in repeated.items():
    expected = ''.join(cfg[k] for k in key.split(' + '))
    if found != expected:
        raise SystemExit('pyproject.toml or __init__.py differs from settings.ini: '
                         f'{key}: settings.ini says {expected!r}, not {found!r}')

def with_addresses(readme):
    "The README with addresses in place of relative links and pictures, for pages that show it elsewhere."
    readme = re.sub(r'(!\[[^]]*\]\()(?!\w+:)', rf"\1{cfg['git_url']}/raw/{cfg['branch']}/", readme)
    return re.sub(r'(\]\()(?!\w+:|#)', rf"\1{cfg['git_url']}/blob/{cfg['branch']}/", readme)


stages = '1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable'
setup(
    name=name, version=cfg['version'], author=cfg['author'], license_expression='Apache-2.0', description=cfg['description'],
    keywords=cfg['keywords'].split(), python_requires=f">={cfg['min_python']}",
    long_description=with_addresses((here / 'README.md').read_text(encoding='utf-8')), long_description_content_type='text/markdown',
    packages=find_packages(include=[name, f'{name}.*']), include_package_data=False,
    package_data={name: ['weights/*']},
    install_requires=cfg['requirements'].split(),
    extras_require={'app': cfg['app_requirements'].split(), 'dev': cfg['dev_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split('\n'), 'nbdev': [f'{name}={name}._modidx:d']},
    classifiers=[
        f"Development Status :: {stages[int(cfg['status']) - 1]}",
        *(f'Programming Language :: Python :: 3.{minor}' for minor in (11, 12, 13)),
        'Intended Audience :: Education', 'Intended Audience :: Science/Research',
        'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    zip_safe=False)
