"Real CIFAR-10: what is read, what is refused, and what is said where there is no network."
import os, urllib.error, urllib.request
from pathlib import Path

import numpy as np
import pytest

from eva_session9.data import cifar10

ROOT = os.environ.get('EVA9_CIFAR10')
needs_cifar10 = pytest.mark.skipif(not ROOT, reason='EVA9_CIFAR10 does not name the folder of CIFAR-10')


@pytest.fixture
def asked(monkeypatch):
    "A machine without a network: every address that is asked for is noted and refused."
    addresses = []

    def refuse(request, *args, **kwargs):
        addresses.append(getattr(request, 'full_url', request))
        raise urllib.error.URLError('no network')
    monkeypatch.setattr(urllib.request, 'urlopen', refuse)
    return addresses


def linked_copy(root):
    "The batches in a folder of its own, as links that a test can replace by altered files."
    (root / 'cifar-10-batches-py').mkdir(parents=True)
    for file in (Path(ROOT) / 'cifar-10-batches-py').iterdir():
        (root / 'cifar-10-batches-py' / file.name).symlink_to(file.resolve())
    return root / 'cifar-10-batches-py'


@pytest.fixture(scope='module')
def sets(): return cifar10(ROOT)


@needs_cifar10
def test_a_folder_may_be_given_from_home(monkeypatch):
    monkeypatch.setenv('HOME', str(Path(ROOT).resolve().parent))
    assert len(cifar10(f'~/{Path(ROOT).resolve().name}')[1]) == 10_000


@needs_cifar10
def test_sizes_and_balance(sets):
    train, test = sets
    assert train.images.shape == (50_000, 32, 32, 3) and test.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(train.labels).tolist() == [5_000] * 10 and np.bincount(test.labels).tolist() == [1_000] * 10
    assert train.classes == test.classes == tuple('airplane automobile bird cat deer dog frog horse ship truck'.split())


@needs_cifar10
def test_statistics_are_the_published_ones(sets):
    mean, std = sets[0].stats()
    assert np.round(mean, 4).tolist() == [.4914, .4822, .4465]
    assert np.round(std, 4).tolist() == [.2470, .2435, .2616]


@needs_cifar10
def test_images_are_rgb_and_upright(sets):
    "The sky is above the ships, and it is blue."
    train = sets[0]
    ships = train.images[train.labels == train.classes.index('ship')].mean((0, 2))  # (rows, channels)
    assert ships[:4].mean() > ships[-4:].mean() + 10
    assert ships[:4, 2].mean() > ships[:4, 0].mean() + 10


@needs_cifar10
def test_whole_files_need_no_network(asked, tmp_path):
    linked_copy(tmp_path)
    train, test = cifar10(tmp_path)
    assert (len(train), len(test)) == (50_000, 10_000) and not asked


@needs_cifar10
@pytest.mark.parametrize('name', ['data_batch_3', 'test_batch', 'batches.meta'])
def test_one_altered_bit_is_refused(name, asked, tmp_path):
    file = linked_copy(tmp_path) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()
    file.write_bytes(data)
    with pytest.raises(FileNotFoundError, match='or not as published'): cifar10(tmp_path)


@needs_cifar10
def test_a_folder_that_was_unpacked_halfway_is_refused(asked, tmp_path):
    (linked_copy(tmp_path) / 'data_batch_5').unlink()
    with pytest.raises(FileNotFoundError): cifar10(tmp_path)
    assert asked


def test_without_network_both_ways_out_are_named(asked, tmp_path):
    with pytest.raises(FileNotFoundError) as raised: cifar10(tmp_path / 'new')
    for words in (str(tmp_path / 'new'), 'no network', 'cifar-10-batches-py', 'shapes'):
        assert words in str(raised.value)
    assert asked and all('cifar-10' in address for address in asked)
    assert [path for path in tmp_path.rglob('*') if path.is_file()] == []


def test_a_download_that_is_cut_is_never_unpacked(monkeypatch, tmp_path):
    class Cut:
        url, length = 'https://example.org/cifar-10-python.tar.gz', 1000
        def __init__(self): self.parts = [b'\x1f\x8b' + bytes(500), b'']
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def read(self, n): return self.parts.pop(0)
    monkeypatch.setattr(urllib.request, 'urlopen', lambda *args, **kwargs: Cut())
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match='could not be downloaded'): cifar10(tmp_path)
        assert not (tmp_path / 'cifar-10-batches-py').exists()
