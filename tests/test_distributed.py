"Two processes that torchrun starts end alike: weights, running statistics, records and errors, whatever each was seeded with."
import os
import subprocess
import sys

import pytest
import torch

SCRIPT = '''
import os, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from eva_session9 import engine
from eva_session9.config import Config, seed_everything
from eva_session9.data import shapes
from eva_session9.preprocessing import loader, test_transforms

process = os.environ.get('RANK', 'alone')
engine.faster_precision = lambda *_: 'fp32' if process in ('0', 'alone') else 'bf16'
seed_everything(0)
images, labels = torch.randn(24, 3, 8, 8), torch.arange(24) % 4

def run(name, *layers, n=24, loader={}, **changes):
    seed_everything(0 if process == 'alone' else int(process))
    model, seen = nn.Sequential(nn.Conv2d(3, 4, 3), *layers, nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)), []
    features = []
    model[0].register_forward_hook(lambda layer, inputs, output: features.append(output.detach()) if layer.training else None)
    model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0][:, 0, 0, 0]) if model.training else None)
    batches = DataLoader(TensorDataset(images[:n], labels[:n]), **{'batch_size': 8, 'shuffle': True, **loader})
    recipe = Config(**{'epochs': 2, 'batch_size': 8, 'lr': 0.05, 'precision': 'fp32', **changes})
    history = engine.fit(model, batches, None, recipe, 'cpu', f'{sys.argv[1]}/{name}')
    return {'state': model.state_dict(), 'losses': [epoch['train_loss'] for epoch in history.epochs], 'precision': history.precision,
            'seen': torch.cat(seen), 'first features': features[0]}

def refused(*arguments, **options):
    try: run(*arguments, **options)
    except (ValueError, FileExistsError, FloatingPointError) as error: return str(error)

class Last(nn.Module):
    "Not a number for the last image of a batch, which the second process gets."
    def forward(self, x):
        if process == '0': return x
        return torch.cat([x[:-1], x[-1:] * float('nan')])

class Spare(nn.Module):
    "Holds a layer that it does not run."
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
    def forward(self, x): return x

class Drawn(nn.Module):
    "Keeps what dropout would draw."
    def __init__(self):
        super().__init__()
        self.numbers = []
    def forward(self, x):
        if self.training: self.numbers.append(torch.rand(4))
        return x

def masks():
    seed_everything(0)
    drawn, images = Drawn(), shapes(24, size=16)
    batches = loader(images, test_transforms(*images.stats()), 8)
    recipe = Config(epochs=2, batch_size=8, precision='fp32')
    engine.fit(nn.Sequential(drawn, nn.Flatten(), nn.Linear(768, 10)), batches, None, recipe, 'cpu')
    return torch.stack(drawn.numbers)

with engine.distributed() as number:
    found = {'number': number,
             'plain': run('plain'),
             'norm': run('norm', nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), lookahead=2, muon_lr=0.02),
             'one step': run('one step', nn.BatchNorm2d(4), n=8, epochs=1),
             'auto': run('auto', precision='auto', loader={'generator': torch.Generator().manual_seed(7)}),
             'dropout': run('dropout', nn.Dropout(), n=23),
             'masks': masks(),
             'again': refused('plain'),
             'nan': refused('nan', Last()),
             'unused': refused('unused', Spare())}
    if process != 'alone': found['sampler'] = refused('sampler', loader={'shuffle': False, 'sampler': DistributedSampler(images)})
    if process != 'alone': found['odd'] = refused('odd', loader={'batch_size': 9}, batch_size=9)
torch.save(found, f'{sys.argv[1]}/{process}.pt')
try:
    with engine.distributed(): pass
except RuntimeError as error: print(error)
'''


def ended(folder, *launcher):
    "What each process found, by its number."
    folder.mkdir()
    script = folder / 'train.py'
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, *launcher, script, folder], capture_output=True, text=True,
                          env={**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'TQDM_DISABLE': '1'})
    assert done.returncode == 0, done.stderr
    assert 'epoch/s' not in done.stderr  # no progress bar, as tqdm's variable says
    assert done.stdout.count('put all of the training into one block') == (2 if launcher else 0)
    return {path.stem: torch.load(path) for path in folder.glob('*.pt')}


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp('distributed')
    launcher = '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2'
    return ended(folder / 'one') | ended(folder / 'two', *launcher)


def test_each_process_is_told_its_number(found): assert [found[name]['number'] for name in ('alone', '0', '1')] == [0, 0, 1]


@pytest.mark.parametrize('run', ['plain', 'norm', 'auto', 'dropout'])
def test_both_processes_end_alike(found, run):
    first, second = found['0'][run], found['1'][run]
    assert first['losses'] == second['losses'] and first['precision'] == second['precision'] == 'fp32'
    for name, value in first['state'].items(): assert torch.equal(value, second['state'][name]), name


@pytest.mark.parametrize('run', ['plain', 'auto'])
def test_they_end_as_one_process_does(found, run):
    alone, together = found['alone'][run], found['0'][run]
    assert together['losses'] == pytest.approx(alone['losses'], rel=1e-5)
    for name, value in alone['state'].items(): torch.testing.assert_close(together['state'][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('run', ['plain', 'auto', 'dropout'])
def test_together_they_see_every_image_once_an_epoch(found, run):
    alone, first, second = (found[name][run]['seen'] for name in ('alone', '0', '1'))
    assert len(first) > len(alone) / 3 and torch.equal(torch.cat([first, second]).sort().values, alone.sort().values)


def test_dropout_differs_between_processes(found):
    alone, first, second = (found[name]['masks'] for name in ('alone', '0', '1'))
    assert torch.equal(first, alone)
    assert (first != second).any(1).all()


def test_running_statistics_are_those_of_the_first_share(found):
    first, second = found['0']['one step'], found['1']['one step']
    variance = first['first features'].transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(first['state']['1.running_var'], 0.9 + 0.1 * variance)
    assert not torch.equal(first['first features'], second['first features'])
    assert torch.equal(second['state']['1.running_var'], first['state']['1.running_var'])


@pytest.mark.parametrize('kind, said', [
    ('again', 'holds a run already'), ('nan', 'the loss is nan at learning rate 0.05, step 0'),
    ('sampler', 'found a DistributedSampler, expected none'), ('odd', 'found 9 for 2 processes, expected a multiple of 2'),
    ('unused', 'the output does not depend on 1.layer.weight, 1.layer.bias')])
def test_all_processes_refuse_alike(found, kind, said):
    assert said in found['0'][kind] and found['0'][kind] == found['1'][kind]
