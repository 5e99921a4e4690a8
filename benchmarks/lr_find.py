"""The time of a learning-rate sweep, and the quality of its suggestions, on this machine.

cost (the default, a minute or two): `find_lr` with --points points against `train` with as many steps, of the same network
on the same random images in float32. The two take turns in one process; a sweep's time includes copying the network and
reading the curve. Small images make the steps short, so that the overhead of the sweep is visible.

rules (five minutes): small networks are trained at seven learning rates from 0.001 to 1, annealed to zero or held
constant, and evaluated on held-out images. Printed for every rule: its suggestion divided by the best of the seven rates
(median), and the loss at the suggestion minus the loss at the best rate (mean and worst, interpolated between the
seven). The two extra rules, `minimum` and `moving average` (the steepest fall of an exponential moving average, as
torch-lr-finder reads it), are for comparison.
"""
import argparse
import copy
import itertools
import json
import statistics
import sys
import time
import warnings

import numpy as np
import torch
from torch import nn

from eva_session9.config import Config, hardware, seed_everything, versions
from eva_session9.data import cifar10, shapes
from eva_session9.engine import test, train, train_step
from eva_session9.lr_finder import find_lr
from eva_session9.models.resnet import BasicBlock, make_model
from eva_session9.optim import make_optimizer

RATES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
SETUPS = [('plain', 32, 0.9), ('residual', 32, 0.9), ('residual', 128, 0.9), ('residual', 32, 0.0)]  # network, batch, momentum


def timed(work):
    "Seconds on the clock, and seconds of processor time, which other programs on the machine disturb less."
    start, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - busy


def cost(args):
    "Seconds of sweeps and of training, taking turns."
    seed_everything(0)
    config, model = Config(precision='fp32'), make_model(args.architecture, 10)
    x = torch.randn(8, args.batch_size, 3, args.size, args.size)
    batches = [(images, torch.randint(10, (args.batch_size,))) for images in x]
    epoch = list(itertools.islice(itertools.cycle(batches), args.points))

    def sweep():
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # random labels: there is nothing to suggest
            curve = find_lr(model, batches, config, end=1e-3, steps=args.points, device='cpu')
        assert len(curve.lrs) == args.points, 'the sweep stopped early, so the times cannot be compared'

    def training():
        trained = copies.pop()
        train(trained, epoch, make_optimizer(trained, config)[0])

    copies = [copy.deepcopy(model) for _ in range(args.repeats + 1)]
    warm = copies.pop()
    train(warm, epoch[:2], make_optimizer(warm, config)[0])
    turns = [(*timed(sweep), *timed(training)) for _ in range(args.repeats)]
    sweeps, sweeps_busy, trainings, trainings_busy = ([round(t, 2) for t in times] for times in zip(*turns))
    median = statistics.median
    return {'architecture': args.architecture, 'batch_size': args.batch_size, 'size': args.size, 'points': args.points,
            'sweep_seconds': sweeps, 'train_seconds': trainings, 'ratio': round(median(sweeps) / median(trainings), 3),
            'sweep_processor_seconds': sweeps_busy, 'train_processor_seconds': trainings_busy,
            'processor_ratio': round(median(sweeps_busy) / median(trainings_busy), 3)}


def small_net(kind):
    "Three strided convolutions to 64 channels, each followed by a residual block or not."
    def stage(i, o):
        layers = [nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        return layers + [BasicBlock(o, o)] if kind == 'residual' else layers
    return nn.Sequential(*stage(3, 16), *stage(16, 32), *stage(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def trained_loss(kind, batches, unseen, rate, momentum, annealed, epochs=3):
    "Loss on unseen images after training at `rate`; that of a guess where training fails."
    seed_everything(1)
    model, steps = small_net(kind).train(), epochs * len(batches)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum)
    order = itertools.chain(*(torch.randperm(len(batches)).tolist() for _ in range(epochs)))
    try:
        for step, batch in enumerate(order):
            if annealed: optimizer.param_groups[0]['lr'] = rate * (1 - step / steps)
            train_step(model, *batches[batch], optimizer)
    except FloatingPointError: return np.log(10)
    return min(test(model, unseen).loss, np.log(10))


def read(curve):
    "Learning rates by rule, with the two extra ones."
    average = [curve.losses[0]]
    for loss in curve.losses[1:]: average.append(0.05 * loss + 0.95 * average[-1])
    lagging = curve.lrs[10:-5][np.gradient(average[10:-5]).argmin()]
    return {**curve.suggestions, 'minimum': 3 * curve.suggestions['minimum/3'], 'moving average': lagging}


def sweeps(kind, batches, momentum, repeats):
    "What each rule reads from sweeps of differently seeded networks; a sweep without a clear fall is left out."
    config, readings = Config(precision='fp32', momentum=momentum), []
    for seed in range(repeats):
        seed_everything(seed)
        curve = find_lr(small_net(kind), batches, config, device='cpu')
        if curve.suggestions: readings.append(read(curve))
    return readings


def rules(args):
    "Excess loss and distance from the best learning rate, by rule and schedule."
    images = cifar10(args.root)[0].subset(np.random.default_rng(0).permutation(50_000)[:5_000]) if args.root else shapes(5_000)
    x = (torch.from_numpy(images.images).permute(0, 3, 1, 2).float() / 255 - 0.47) / 0.25
    y = torch.from_numpy(images.labels)
    unseen, found = [(x[3_000:], y[3_000:])], {}
    for kind, batch_size, momentum in SETUPS:
        batches = list(zip(x[:3_000].split(batch_size), y[:3_000].split(batch_size)))
        readings = sweeps(kind, batches, momentum, args.repeats)
        for schedule in ('annealed', 'constant'):
            losses = np.array([trained_loss(kind, batches, unseen, rate, momentum, schedule == 'annealed') for rate in RATES])
            for rule, rate in (item for reading in readings for item in reading.items()):
                excess = np.interp(np.log(rate), np.log(RATES), losses) - losses.min()
                found.setdefault((rule, schedule), []).append((rate / RATES[losses.argmin()], excess))
    return {'data': 'cifar10' if args.root else 'shapes', 'setups': SETUPS, 'rules': [
        {'rule': rule, 'schedule': schedule, 'n': len(values), 'times_best': round(float(np.median(values, 0)[0]), 2),
         'excess_loss': round(float(np.mean(values, 0)[1]), 3), 'worst': round(float(np.max(values, 0)[1]), 3)}
        for (rule, schedule), values in found.items()]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', nargs='?', choices=('cost', 'rules'), default='cost', help='what to measure (default cost)')
    parser.add_argument('--repeats', type=int, default=5, help='repetitions of each (cost), or sweeps per network (rules); default 5')
    parser.add_argument('--points', type=int, default=100, help='points per sweep, for cost (default 100)')
    parser.add_argument('--architecture', default='resnet18', help='for cost (default resnet18)')
    parser.add_argument('--batch-size', type=int, default=32, help='for cost (default 32)')
    parser.add_argument('--size', type=int, default=8,
                        help='image height and width in pixels, for cost (default 8; 32 takes ten times as long)')
    parser.add_argument('--root', help='folder of the CIFAR-10 files, for rules; without it, drawn shapes')
    args = parser.parse_args()
    start = time.perf_counter()
    result = {'cost': cost, 'rules': rules}[args.what](args)
    print(json.dumps({**result, 'seconds': round(time.perf_counter() - start, 1), 'hardware': hardware(torch.device('cpu')),
                      'versions': versions(), 'command': ' '.join(['python', *sys.argv])}))


if __name__ == '__main__': main()
