"""The learning-rate finder against torch-lr-finder, and its promise to leave no trace against the loaders,
schedulers, wrappers and interruptions that people have."""
import copy
import hashlib
import io
import multiprocessing
import os
import signal
import tempfile
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from eva_session9.config import Config, rng_state, seed_everything
from eva_session9.data import shapes
from eva_session9.engine import fit, train_step
from eva_session9.lr_finder import LRCurve, find_lr
from eva_session9.preprocessing import loader, train_transforms

@pytest.fixture
def peer(): return pytest.importorskip('torch_lr_finder', reason='needs torch-lr-finder, of the dev extra')
RECIPE = Config(precision='fp32', epochs=2, batch_size=16, cutout=4)


@pytest.fixture(autouse=True)
def quiet():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'the loss|the suggestions|.* points', UserWarning)
        yield
    torch.set_num_threads(threads)


def tiny_net():
    seed_everything(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(288, 10))


def pictures(n=128):
    rng = torch.Generator().manual_seed(1)
    labels = torch.randint(10, (n,), generator=rng)
    return TensorDataset(torch.randn(10, 3, 8, 8, generator=rng)[labels] + torch.randn(n, 3, 8, 8, generator=rng), labels)


def digest(*states):
    "A hash cannot change with the thing it describes."
    buffer = io.BytesIO()
    torch.save(states, buffer)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def everything(net, optimizer, schedule):
    layout = [(p.stride(), str(p.device), p.grad) for p in net.parameters()]
    return digest(net.state_dict(), layout, [m.training for m in net.modules()], optimizer.state_dict(), schedule.state_dict(), rng_state())


# Against torch-lr-finder

def test_every_loss_of_a_sweep_is_the_peers(peer):
    batches = DataLoader(pictures(), 16)
    net, criterion = tiny_net(), nn.CrossEntropyLoss()
    theirs = copy.deepcopy(net)
    finder = peer.LRFinder(theirs, torch.optim.SGD(theirs.parameters(), 1e-5, 0.9), criterion, device='cpu')
    before = rng_state()['torch']
    finder.range_test(batches, start_lr=1e-5, end_lr=0.1, num_iter=50, smooth_f=0, diverge_th=1e9)
    torch.set_rng_state(before)
    curve = find_lr(net, batches, RECIPE, start=1e-5, end=0.1, steps=50, device='cpu')
    np.testing.assert_allclose(curve.lrs, finder.history['lr'], rtol=1e-12)
    np.testing.assert_allclose(curve.losses, finder.history['loss'], rtol=1e-5)


def peer_steepest(peer, lrs, losses):
    "What torch-lr-finder suggests for these raw losses, with its default smoothing."
    smooth = [losses[0]]
    for loss in losses[1:]: smooth.append(0.05 * loss + 0.95 * smooth[-1])
    finder = peer.LRFinder(nn.Linear(1, 1), torch.optim.SGD(nn.Linear(1, 1).parameters(), 1), None)
    finder.history = {'lr': lrs, 'loss': smooth}
    return finder.plot(ax=matplotlib.figure.Figure().subplots())[1]


def test_steepest_is_not_late_where_the_peers_is(peer):
    lrs = np.geomspace(1e-6, 10, 100)
    true = 2.3 - 0.9 / (1 + (0.063 / lrs)**1.45) + 0.0121 * lrs**3  # steepest at 0.063, lowest at 0.9
    sweeps = [(true + np.random.default_rng(seed).normal(0, 0.08, 100)).tolist() for seed in range(40)]
    ours = [LRCurve(lrs.tolist(), losses).suggestions['steepest'] for losses in sweeps]
    theirs = [peer_steepest(peer, lrs.tolist(), losses) for losses in sweeps]
    assert 0.8 < np.median(ours) / 0.063 < 1.25
    assert np.median(theirs) / 0.063 > 2.5
    assert np.std(np.log10(ours)) < np.std(np.log10(theirs))


def test_an_attached_scheduler_stops_the_peer_only(peer):
    net = tiny_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(RuntimeError, match='already has a scheduler'):
        peer.LRFinder(net, optimizer, nn.CrossEntropyLoss(), device='cpu').range_test(DataLoader(pictures(), 16))
    assert find_lr(net, DataLoader(pictures(), 16), RECIPE, optimizer, steps=20, device='cpu').lrs


# Leaving no trace

SCHEDULERS = {'StepLR': lambda o: lr_scheduler.StepLR(o, 3), 'OneCycleLR': lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=99),
              'ReduceLROnPlateau': lr_scheduler.ReduceLROnPlateau, 'LinearLR': lr_scheduler.LinearLR}
OPTIMIZERS = {'SGD': lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
              'AdamW': lambda p: torch.optim.AdamW(p, 0.001, amsgrad=True)}


class Interrupted:
    "Batches that end the sweep at step 7: by an error, or by a real Ctrl-C."
    def __init__(self, batches, how): self.batches, self.how = batches, how

    def __iter__(self):
        for step, batch in enumerate(self.batches):
            if step == 7 and self.how == 'error': raise OSError('the disk is gone')
            if step == 7 and self.how == 'ctrl-c':
                signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
                os.kill(os.getpid(), signal.SIGINT)
            yield batch


@pytest.mark.parametrize('kind, schedule', [
    ('SGD', 'OneCycleLR'), ('SGD', 'ReduceLROnPlateau'), ('AdamW', 'StepLR'), ('AdamW', 'LinearLR')])
@pytest.mark.parametrize('how', ['to the end', 'diverges', 'error', 'ctrl-c'])
def test_nothing_is_changed(kind, schedule, how, tmp_path, monkeypatch):
    net = tiny_net().to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS[kind](net.parameters())
    scheduler = SCHEDULERS[schedule](optimizer)
    for batch in DataLoader(pictures(48), 16):
        train_step(net, *batch, optimizer)
        scheduler.step(*[1.0] if schedule == 'ReduceLROnPlateau' else [])
    net[1].eval()
    batches = DataLoader(pictures(), 16, shuffle=True, generator=torch.Generator().manual_seed(3))
    before, order = everything(net, optimizer, scheduler), batches.generator.get_state()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    sweep = {'end': 1e4 if how == 'diverges' else 1e-3, 'steps': 30, 'device': 'cpu'}
    if how in ('error', 'ctrl-c'):
        with pytest.raises(OSError if how == 'error' else KeyboardInterrupt):
            find_lr(net, Interrupted(batches, how), RECIPE, optimizer, **sweep)
    else:
        curve = find_lr(net, batches, RECIPE, optimizer, **sweep)
        assert (curve.stopped == 'finished') == (how == 'to the end')
    assert everything(net, optimizer, scheduler) == before
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(batches.generator.get_state(), order)


@pytest.mark.parametrize('workers', [0, 2])
def test_training_gives_the_same_bits_with_and_without_a_sweep(workers):
    images = shapes(80, size=16)
    transform = train_transforms(*images.stats(), RECIPE)

    def trained(look_first):
        seed_everything(5)
        net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(392, 10))
        batches = loader(images, transform, 16, num_workers=workers, persistent_workers=workers > 0)
        if look_first: find_lr(net, batches, RECIPE, steps=12, device='cpu')
        history = fit(net, batches, config=RECIPE, device='cpu')
        return digest(net.state_dict()), [epoch['train_loss'] for epoch in history.epochs]

    assert trained(True) == trained(False)


class Noisy(TensorDataset):
    "A data set that draws from the global generator, as torchvision's augmentation does."
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + torch.randn(()), y


@pytest.mark.parametrize('options', [{}, {'num_workers': 1}, {'num_workers': 1, 'persistent_workers': True}], ids=str)
def test_a_foreign_loader_goes_on_where_it_stood(options):
    def batches():
        seed_everything(0)
        return DataLoader(Noisy(*pictures(64).tensors), 16, shuffle=True, generator=torch.Generator().manual_seed(3), **options)

    def two_passes(loader): return digest(list(loader)), digest(list(loader))

    untouched = two_passes(batches())
    swept = batches()
    seed_everything(0)
    state = torch.get_rng_state()
    find_lr(tiny_net(), swept, RECIPE, steps=10, device='cpu')
    torch.set_rng_state(state)
    assert two_passes(swept) == untouched


class Breaking(nn.Module):
    "A network that is interrupted in its fourth step."
    def __init__(self):
        super().__init__()
        self.net, self.steps = tiny_net(), 0

    def forward(self, x):
        self.steps += 1
        if self.steps == 4: raise KeyboardInterrupt
        return self.net(x)


@pytest.mark.parametrize('persistent', [False, True])
def test_no_worker_is_left_running(persistent):
    batches, net = DataLoader(pictures(), 16, num_workers=1, persistent_workers=persistent), Breaking()
    with pytest.raises(KeyboardInterrupt) as kept:  # its traceback keeps the frames of the sweep alive
        find_lr(net, batches, RECIPE, steps=20, device='cpu')
    assert kept.value and net.steps == 0
    assert multiprocessing.active_children() == []


# Every road the engine has

def test_bfloat16_takes_the_engines_step_and_leaves_the_layout():
    net, batches = tiny_net(), list(DataLoader(pictures(), 16))
    strides = [p.stride() for p in net.parameters()]
    curve = find_lr(net, batches, Config(precision='bf16'), steps=20, end=0.1, device='cpu')
    exact = find_lr(net, batches, RECIPE, steps=20, end=0.1, device='cpu')
    assert curve.precision == 'bf16' and [p.stride() for p in net.parameters()] == strides
    assert 1e-3 < np.abs(np.subtract(curve.losses, exact.losses)).max() < 0.1


def test_auto_precision_is_resolved_and_recorded():
    net, batches = tiny_net(), list(DataLoader(pictures(), 16))
    before = digest(net.state_dict(), rng_state())
    curve = find_lr(net, batches, Config(), steps=10, device='cpu')
    assert curve.precision in ('fp32', 'bf16') and curve.config.precision == 'auto'
    assert digest(net.state_dict(), rng_state()) == before


def test_a_compiled_model_is_swept():
    net, batches = tiny_net(), list(DataLoader(pictures(), 16))
    curve = find_lr(torch.compile(net, backend='eager'), batches, RECIPE, steps=10, device='cpu')
    assert curve.losses == find_lr(net, batches, RECIPE, steps=10, device='cpu').losses


def test_momentum_is_carried_into_the_sweep():
    net, batches = tiny_net(), list(DataLoader(pictures(), 16))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    fresh = find_lr(net, batches, RECIPE, optimizer, start=0.1, end=0.2, steps=10, device='cpu')
    for p in net.parameters(): optimizer.state[p]['momentum_buffer'] = torch.full_like(p, 0.05)
    assert find_lr(net, batches, RECIPE, optimizer, start=0.1, end=0.2, steps=10, device='cpu').losses[1:] != fresh.losses[1:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_the_model_stays_where_it_is():
    net, batches = tiny_net(), list(DataLoader(pictures(), 16))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    train_step(net, *batches[0], optimizer)
    before = digest(net.state_dict(), optimizer.state_dict(), rng_state())
    assert find_lr(net, batches, RECIPE, optimizer, steps=20, device='cuda').hardware == torch.cuda.get_device_name()
    assert digest(net.state_dict(), optimizer.state_dict(), rng_state()) == before
