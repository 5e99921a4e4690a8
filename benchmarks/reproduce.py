"""The accuracy of a recipe over several seeds: mean, standard deviation, lowest, and a 95% interval of the mean.

    python benchmarks/reproduce.py --config fast --seeds 10 --out results/fast.json

trains on the whole training set and uses the test set once per seed, at the end. To choose between recipes, hold images
out of the training set and leave the test set alone:

    python benchmarks/reproduce.py --config fast --seeds 3 --hold-out 5000 --set lookahead=0

The accuracy is without test-time augmentation. Two kinds of test-time augmentation are reported separately: `flip`, the mean of
the logits for an image and its mirror image, and `six views`, which adds both shifted diagonally by one pixel (up and left, down
and right), each with half the weight (as in airbench).

The seconds from process start to this accuracy are `seconds_to_start` (imports and data) plus a run's `seconds` and
`seconds_to_test`; the median over runs is `seconds_to_accuracy`.
"""
import time

START = time.perf_counter()  # ahead of the imports that take seconds

import argparse
import json
import math
import shlex
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import t

from eva_session9.cli import _config, _save_trained, _sets
from eva_session9.config import config_from, seed_everything, versions
from eva_session9.engine import fit, forward, test
from eva_session9.preprocessing import recipe_batches
from eva_session9.save_load import recipe_model, write_atomically


def changed(config, settings):
    "The recipe with `name=value` settings; values are JSON, or else text."
    values = {}
    for name, _, value in (setting.partition('=') for setting in settings):
        try: values[name] = json.loads(value)
        except json.JSONDecodeError: values[name] = value
    return config_from({**asdict(config), **values})


def held_out(images, n):
    "The set without `n` random images, always the same, and these."
    if not 0 < n < len(images): raise SystemExit(f'--hold-out: found {n}, expected 1 to {len(images) - 1}, of {len(images)} images')
    order = np.random.default_rng(0).permutation(len(images))
    return images.subset(np.sort(order[n:])), images.subset(np.sort(order[:n]))


def looks(model, x, precision):
    "Logits by an image and its mirror image, and by six views."
    def both(x): return (forward(model, x, precision) + forward(model, x.flip(3), precision)) / 2
    border, (h, w) = F.pad(x, (1, 1, 1, 1), 'reflect'), x.shape[2:]
    mirrored, shifted = both(x), (both(border[:, :, :h, :w]) + both(border[:, :, 2:, 2:])) / 2
    return {'flip': mirrored, 'six views': (mirrored + shifted) / 2}


@torch.inference_mode()
def accuracies(model, batches, precision):
    "Accuracy by each way to look more than once."
    device, correct, n = next(model.parameters()).device, {}, 0
    model.eval()
    for x, y in batches:
        n += len(y)
        for way, logits in looks(model, x.to(device), precision).items():
            correct[way] = correct.get(way, 0) + (logits.argmax(1) == y.to(device)).sum().item()
    return {way: right / n for way, right in correct.items()}


def kept(model, train_set, history, tested, command, out):
    "Write the model with its card and the record, as `eva9_train` does."
    history.command = command
    history.weights_sha256 = _save_trained(model, train_set, history, tested, out)['sha256']
    history.save(out / 'history.json')


def one_run(config, train_set, test_set, keep, command):
    "Train with the recipe's seed, and test once."
    start = time.perf_counter()
    train_batches, test_batches = recipe_batches(config, train_set, test_set)
    seed_everything(config.seed)
    model = recipe_model(config, len(train_set.classes))
    out = keep and Path(keep) / f'seed-{config.seed}'
    history = fit(model, train_batches, None, config, out=out, resume=out is not None)
    seconds = max(time.perf_counter() - start, history.seconds)  # a run that was resumed took at least its epochs
    start = time.perf_counter()
    accuracy = {'plain': test(model, test_batches, history.precision).accuracy}
    testing = time.perf_counter() - start
    accuracy |= accuracies(model, test_batches, history.precision)
    if out: kept(model, train_set, history, {'accuracy': accuracy['plain'], 'tested_on': len(test_set)}, command, out)
    return {'seed': config.seed, 'accuracy': accuracy,
            'seconds': round(seconds, 2), 'seconds_to_test': round(testing, 2), 'precision': history.precision,
            'hardware': history.hardware, 'history': history.epochs}


def summary(values):
    "Mean, spread and the interval that holds the mean with 95% confidence (Student's t)."
    n, mean = len(values), statistics.mean(values)
    if n < 2: return {'mean': round(mean, 5), 'min': round(mean, 5), 'n': n}
    sd = statistics.stdev(values)
    half = t.ppf(0.975, n - 1) * sd / math.sqrt(n)
    return {'mean': round(mean, 5), 'sd': round(sd, 5), 'min': round(min(values), 5), 'n': n,
            'interval95': [round(mean - half, 5), round(mean + half, 5)]}


def command(args, script='reproduce.py', **more):
    "The command line that repeats the measurement, without this machine's folders; `more` are flags of another script."
    given = {'--data': args.data, '--limit': args.limit, '--config': args.config, '--seeds': args.seeds,
             '--hold-out': args.hold_out, **more}
    words = [word for flag, value in given.items() if value for word in (flag, str(value))]
    return shlex.join(['python', f'benchmarks/{script}', *words, *(word for setting in args.set for word in ('--set', setting))])


def unfinished(path):
    "Where a result is kept until it is whole, so that a run that fails spares an earlier one."
    return path.with_name(f'{path.name}.part')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default='fast', help="'session9', 'fast', 'laptop', or a .json file of fields (default fast)")
    parser.add_argument('--set', action='append', default=[], metavar='FIELD=VALUE', help='change a field of the recipe; may be repeated')
    parser.add_argument('--seeds', type=int, default=10, help='number of seeds, starting at 42 (default 10)')
    parser.add_argument('--data', default='cifar10', help="'cifar10', 'shapes', or a folder of images (default cifar10)")
    parser.add_argument('--root', help='folder of the CIFAR-10 files')
    parser.add_argument('--limit', type=int, help='use at most this many training images and this many test images')
    parser.add_argument('--hold-out', type=int, default=0, metavar='N', help='test on N images held out of the training set')
    parser.add_argument('--keep', help='folder for checkpoints and models; with it, an interrupted run resumes')
    parser.add_argument('--out', type=Path, help='also write the result to this .json file; until all seeds are done, to FILE.part')
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True  # of a GPU; otherwise without effect
    config = changed(_config(args.config), args.set)
    if args.seeds < 1: raise SystemExit(f'--seeds: found {args.seeds}, expected 1 or more')
    if any(setting.startswith('seed=') for setting in args.set):
        raise SystemExit('--set seed: the seeds are 42, 43, ...; choose how many with --seeds')
    sets = _sets(args.data, args.root, args.limit)
    if args.hold_out: sets = held_out(sets[0], args.hold_out)
    runs, waited = [], time.perf_counter() - START
    for seed in range(42, 42 + args.seeds):
        runs.append(one_run(replace(config, seed=seed), *sets, args.keep, command(args)))
        ways = {way: summary([run['accuracy'][way] for run in runs]) for way in runs[0]['accuracy']}
        so_far = argparse.Namespace(**{**vars(args), 'seeds': len(runs)})
        result = {**ways.pop('plain'), 'test_time_augmentation': ways, 'tested_on': len(sets[1]), 'held_out': bool(args.hold_out),
                  'seconds_a_run': round(statistics.median(run['seconds'] for run in runs), 2), 'seconds_to_start': round(waited, 2),
                  'seconds_to_accuracy': round(statistics.median(waited + run['seconds'] + run['seconds_to_test'] for run in runs), 2),
                  'config': asdict(config), 'runs': runs,
                  'hardware': ' and '.join(sorted({run['hardware'] for run in runs})), 'versions': versions(),
                  'seconds': round(sum(run['seconds'] + run['seconds_to_test'] for run in runs), 1), 'command': command(so_far)}
        if args.out: write_atomically(unfinished(args.out), json.dumps(result, indent=1).encode() + b'\n')
        print(seed, runs[-1]['accuracy'], f"{runs[-1]['seconds']} s", flush=True)
    if args.out: unfinished(args.out).replace(args.out)
    print(json.dumps({name: value for name, value in result.items() if name != 'runs'}, indent=1))


if __name__ == '__main__': main()
