"""What a run and its files survive: kills, full disks, truncation, flipped bits.

Children come from a fork server that has imported PyTorch once, so that killing dozens of them is cheap.
"""
import hashlib
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from eva_session9.config import Config, seed_everything
from eva_session9.data import ImageSet
from eva_session9.engine import fit
from eva_session9.preprocessing import Batches, KeyedLoader, loader, test_transforms, train_transforms
from eva_session9.save_load import CheckpointError, checkpoints, load_checkpoint, load_model, save_checkpoint, save_model
from eva_session9.models.resnet import make_model

context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['eva_session9.engine', 'eva_session9.preprocessing'])


def in_child(target, *args):
    "Run `target` in a process of its own and return its exit code, negative for a signal."
    child = context.Process(target=target, args=args)
    child.start()
    child.join(120)
    if child.is_alive():
        child.kill()
        raise TimeoutError(f'{target.__name__} was at work for two minutes')
    return child.exitcode


class Kills:
    "Kills the process as it asks for step 2 of epoch `when`."
    when = None

    def __iter__(self):
        for step, batch in enumerate(super().__iter__()):
            if self.sampler.epoch == self.when and step == 2: os.kill(os.getpid(), signal.SIGKILL)
            yield batch


class KillingLoader(Kills, KeyedLoader): pass
class KillingBatches(Kills, Batches): pass


def course_batches(images, seed, workers):
    "The course's recipe, and its batches from a loader."
    config = Config(epochs=3, batch_size=6, cutout=4, seed=seed, precision='fp32', step_size=2)
    batches = loader(images, train_transforms(*images.stats(), config), config.batch_size, seed, workers,
                     multiprocessing_context='fork' if workers else None)
    batches.__class__ = KillingLoader
    return config, batches


def fast_batches(images, seed):
    "A recipe with all that others add, and its batches made on the device. Weights are averaged at steps 5, 10 and 12."
    config = replace(Config.fast(), epochs=3, batch_size=6, crop=2, sizes=(8, 12), muon_lr=0.05, seed=seed, precision='bf16')
    return config, KillingBatches(images, train_transforms(*images.stats(), config, size=12), config.batch_size, seed, 'cpu')


def train_small(out, seed, workers, when):
    "Three epochs of a small network with dropout, killed in epoch `when`, resumed if `out` holds a run."
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    images = ImageSet(rng.integers(0, 256, (24, 12, 12, 3), dtype=np.uint8), np.arange(24) % 3, ('a', 'b', 'c'))
    config, batches = fast_batches(images, seed) if workers == 'batched' else course_batches(images, seed, workers)
    batches.when = when
    seed_everything(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
                          nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    tests = loader(images, test_transforms(*images.stats()), 24, shuffle=False)
    fit(model, batches, tests, config, 'cpu', out=out, resume=True)


def weights_digest(out):
    state = load_checkpoint(out)['model']
    return hashlib.sha256(b''.join(v.numpy().tobytes() for v in state.values())).hexdigest()


@pytest.mark.parametrize('seed, workers, when', [*product((1, 2, 3), (0, 2, 'batched'), (1,)), (1, 0, 0)])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, seed, workers, when):
    assert in_child(train_small, tmp_path / 'whole', seed, workers, None) == 0
    assert in_child(train_small, tmp_path / 'cut', seed, workers, when) == -signal.SIGKILL
    assert [path.stem for path in checkpoints(tmp_path / 'cut')] == [f'epoch-{e:04}' for e in range(when + 1)]
    assert in_child(train_small, tmp_path / 'cut', seed, workers, None) == 0
    assert weights_digest(tmp_path / 'cut') == weights_digest(tmp_path / 'whole')
    whole, cut = (load_checkpoint(tmp_path / name)['history']['history'] for name in ('whole', 'cut'))
    assert [{**e, 'seconds': 0} for e in cut] == [{**e, 'seconds': 0} for e in whole]


def save_for_ever(out):
    for epoch in range(1, 10_000): save_checkpoint(out, epoch, {'epoch': epoch, 'x': torch.full((200_000,), float(epoch))})


def test_kills_while_saving_leave_a_sound_checkpoint(tmp_path):
    rng = random.Random(0)
    for _ in range(20):
        shutil.rmtree(tmp_path / 'run', ignore_errors=True)
        child = context.Process(target=save_for_ever, args=(tmp_path / 'run',))
        child.start()
        while len(checkpoints(tmp_path / 'run')) < 2:
            assert child.is_alive()
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        child.kill()
        child.join(120)
        state = load_checkpoint(tmp_path / 'run')
        assert (state['x'] == state['epoch']).all()
    save_checkpoint(tmp_path / 'run', state['epoch'] + 1, {})
    assert not list((tmp_path / 'run').glob('*.part'))


def save_on_a_full_disk(out):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    with pytest.raises(CheckpointError, match='epoch-0002.pt: could not write 8.*free some space'):
        save_checkpoint(out, 2, {'x': torch.zeros(200_000)})


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, {'x': 1})
    before = sorted(p.name for p in tmp_path.iterdir())
    assert in_child(save_on_a_full_disk, tmp_path) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert load_checkpoint(tmp_path) == {'x': 1}


def damaged(blob, count):
    "`blob` truncated at eight lengths, and with one random bit flipped `count` times."
    rng = random.Random(0)
    yield from (blob[:len(blob) * k // 8] for k in range(8))
    for _ in range(count):
        flipped = bytearray(blob)
        flipped[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
        yield bytes(flipped)


def test_a_damaged_checkpoint_never_loads(tmp_path):
    manifest = save_checkpoint(tmp_path, 1, {'x': torch.arange(500.0)})
    path = manifest.with_suffix('.pt')
    for blob in damaged(path.read_bytes(), 200):
        path.write_bytes(blob)
        with pytest.raises(CheckpointError, match='epoch-0001.pt: damaged'): load_checkpoint(manifest)


def test_a_damaged_model_never_loads(tmp_path):
    path = tmp_path / 'model.safetensors'
    card = dict(architecture='resnet18', classes=['a', 'b'], mean=[0.5] * 3, std=[0.2] * 3, size=32)
    save_model(make_model('resnet18', 2), path, card, torch.float16)
    for blob in damaged(path.read_bytes(), 8):
        path.write_bytes(blob)
        with pytest.raises(CheckpointError, match='sha256 differs'): load_model(path)


def test_spawned_workers_give_the_bytes_of_forked_ones():
    rng = np.random.default_rng(0)
    images = ImageSet(rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8), np.arange(8), tuple('abcdefgh'))
    transform = train_transforms(*images.stats())
    spawned, forked = (torch.cat([x for x, y in loader(images, transform, 4, num_workers=2, multiprocessing_context=method)])
                       for method in ('spawn', 'fork'))
    assert torch.equal(spawned, forked)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc is told to keep freed memory')
def test_freed_memory_is_kept():
    "As `fit` asks on a processor: a freed tensor of 256 MB stays with the process, and does not otherwise."
    def resident(before):
        code = ('import torch; from eva_session9.engine import _keep_memory; '
                f'{before}; x = torch.ones(2**26); del x; print(open("/proc/self/statm").read())')
        said = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout
        return int(said.split()[1]) * resource.getpagesize()
    assert resident('_keep_memory()') - resident('pass') > 200e6
