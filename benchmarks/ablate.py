"""Ablation: the accuracy of a recipe without each of its parts against the whole recipe, on images held out of the training set.

    python benchmarks/ablate.py --out ablation.json

runs the fast recipe unchanged, for which a GPU is needed in practice. On a CPU, run a smaller version: fewer images and epochs,
images of half the height and width (means of 2 x 2 pixels), two runs at a time:

    python benchmarks/ablate.py --limit 22000 --set epochs=4 --set crop=2 --half --jobs 2 --seeds 1 --out small.json

To compare the recipe with variants, give the fields that differ:

    python benchmarks/ablate.py --variant cutout=8,cutout_p=1 --variant muon_lr=0 --out cutout.json

Each variant is trained from the same seeds. Each difference has a confidence interval: Student's t with the
standard deviation between seeds pooled over all variants, at a joint level of 95% (Bonferroni). The test set is not read. An
interrupted run resumes from --out, and a later run with more --seeds adds to it.
"""
import argparse
import json
import math
import multiprocessing
import re
import shlex
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

import torch
from scipy.stats import t

from eva_session9.cli import _config, _sets
from eva_session9.config import Config, hardware, pick_device, seed_everything, versions
from eva_session9.engine import faster_precision, fit, test
from eva_session9.models.resnet import make_model
from eva_session9.preprocessing import recipe_batches
from eva_session9.save_load import recipe_model, write_atomically
from reproduce import changed, command, held_out, kept

WHOLE, COURSE = 'the whole recipe', "the course's recipe"
COMMA = re.compile(r',(?![^\[]*\])')  # not one of a list


def variants(config):
    "The recipe, the recipe without each part it has or with one more, and the course's for as many epochs: name -> recipe."
    drop = max(1, round(0.3 * config.epochs))  # the course's schedule, in proportion: three drops in 20 epochs
    cutout = 4 * config.crop or 16  # 16 pixels where a shift may be of 4, as in the course
    changes = {
        'SGD in place of Muon': {'muon_lr': 0.0},
        'steps in place of warm-up and a fall to zero': {'warmup': 0.0, 'step_size': drop},
        "no Nesterov's form": {'nesterov': False},
        'no weight decay': {'weight_decay': 0.0},
        'no label smoothing': {'label_smoothing': 0.0},
        'no averaging of the weights': {'lookahead': 0},
        'blocks do not begin as the identity': {'zero_gamma': False},
        'no shifts': {'crop': 0},
        'flips at random': {'alternating_flip': False},
        'no flips': {'alternating_flip': False, 'flip_p': 0.0},
        'rotation and cutout as well': {'rotate': 15.0, 'cutout': cutout},
        'Muon as well': {'muon_lr': 0.08}}
    changed_recipes = {name: replace(config, **fields) for name, fields in changes.items()}
    return {WHOLE: config, **{name: recipe for name, recipe in changed_recipes.items() if recipe != config},
        COURSE: Config(config.architecture, config.epochs, step_size=drop, cutout=cutout, precision=config.precision)}


def asked_for(config, settings):
    "The recipe, and the recipe with each of the `field=value,field=value` settings."
    return {WHOLE: config, **{setting: changed(config, COMMA.split(setting)) for setting in settings}}


def halved(images):
    "The set at half the side, each pixel the mean of four."
    n, h, w, c = images.images.shape
    means = images.images.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
    return replace(images, images=means.round().astype('uint8'), masks=None)


def sets(args):
    "The images to train on, and those held out of them."
    images = _sets(args.data, args.root, args.limit)[0]
    return held_out(halved(images) if args.half else images, args.hold_out)


def asked(args):
    "The question that the file answers."
    try: return json.loads(args.out.read_text())['question']
    except (ValueError, KeyError): raise SystemExit(f'{args.out} holds no ablation; choose another file') from None


def settled(args, config):
    "The recipe with the precision that is faster here, chosen once for all runs."
    if config.precision != 'auto': return config
    if args.out and args.out.exists(): return replace(config, precision=asked(args)['recipes'][WHOLE]['precision'])
    torch.set_num_threads(args.threads)
    device, n, side = pick_device(), config.batch_size, 16 if args.half else 32
    x, y = torch.randn(n, 3, side, side, device=device), torch.zeros(n, dtype=torch.long, device=device)
    return replace(config, precision=faster_precision(make_model(config.architecture, 10).to(device), x, y))


def one_run(args, name, config):
    "Train by the recipe; the accuracy on the images held out, None where the loss was no number, and the seconds it took."
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # of a GPU; otherwise without effect
    train_set, test_set = sets(args)
    train_batches, test_batches = recipe_batches(config, train_set, test_set)
    seed_everything(config.seed)
    model, start = recipe_model(config, len(train_set.classes)), time.perf_counter()
    try: history = fit(model, train_batches, None, config)
    except FloatingPointError: accuracy = None
    else: accuracy = test(model, test_batches, config.precision).accuracy
    seconds = round(time.perf_counter() - start, 1)
    if args.keep and accuracy is not None:
        tested = {'accuracy': accuracy, 'tested_on': len(test_set)}
        kept(model, train_set, history, tested, recorded(args), Path(args.keep) / name / f'seed-{config.seed}')
    return {'seed': config.seed, 'accuracy': accuracy, 'seconds': seconds, 'hardware': hardware(pick_device())}


def compared(runs):
    "Mean of each variant, and its difference from the whole recipe with half the width of the interval."
    found = {name: [run['accuracy'] for run in done if run['accuracy'] is not None] for name, done in runs.items()}
    found = {name: values for name, values in found.items() if values}
    degrees = sum(len(values) - 1 for values in found.values())
    spread = math.sqrt(sum((len(v) - 1) * statistics.variance(v) for v in found.values() if len(v) > 1) / degrees) if degrees else None
    rows = {name: {'mean': round(statistics.mean(values), 5), 'n': len(values), 'diverged': len(runs[name]) - len(values)}
            for name, values in found.items()}
    for name, row in rows.items():
        if name == WHOLE or WHOLE not in rows: continue
        row['difference'] = round(statistics.mean(found[name]) - statistics.mean(found[WHOLE]), 5)
        if not degrees: continue
        factor = t.ppf(1 - 0.05 / 2 / (len(rows) - 1), degrees)
        row['half_width'] = round(factor * spread * math.sqrt(1 / row['n'] + 1 / rows[WHOLE]['n']), 5)
    never = [name for name, done in runs.items() if done and name not in found]
    return {'spread_between_seeds': spread and round(spread, 5), 'variants': rows, 'always_diverged': never}


def question(args, recipes):
    "What must be the same for runs to be compared, as JSON has it."
    return json.loads(json.dumps({'recipes': {name: asdict(recipe) for name, recipe in recipes.items()}, 'data': args.data,
                                  'limit': args.limit, 'half': args.half, 'held_out': args.hold_out, 'versions': versions()}))


def before(args, recipes):
    "The runs that the file holds already, if they answer the same question."
    if not (args.out and args.out.exists()): return {name: [] for name in recipes}
    if asked(args) != question(args, recipes):
        raise SystemExit(f'{args.out} holds a measurement with other settings or versions; choose another file')
    return json.loads(args.out.read_text())['trained']


def recorded(args):
    "The command line that repeats the measurement."
    return (command(args, 'ablate.py', **{'--jobs': args.jobs}) + ' --half' * args.half
            + ''.join(f' --variant {shlex.quote(variant)}' for variant in args.variant))


def save(args, runs, recipes):
    "Write what is known so far."
    done = [run for group in runs.values() for run in group]
    result = {**compared(runs), 'question': question(args, recipes), 'trained': runs, 'versions': versions(),
              'command': recorded(args),
              'hardware': ' and '.join(sorted({run['hardware'] for run in done})), 'seconds': round(sum(run['seconds'] for run in done), 1)}
    if args.out: write_atomically(args.out, json.dumps(result, indent=1).encode() + b'\n')
    return result


def train_all(args, runs, recipes):
    "Train what is missing, the seeds one after another, and save after each run."
    tasks = [(name, seed) for seed in range(42, 42 + args.seeds) for name in recipes if seed not in {run['seed'] for run in runs[name]}]
    pool = ProcessPoolExecutor(args.jobs, multiprocessing.get_context('spawn'))
    try:
        futures = {pool.submit(one_run, args, name, replace(recipes[name], seed=seed)): name for name, seed in tasks}
        for future in as_completed(futures):
            runs[futures[future]].append(future.result())
            save(args, runs, recipes)
            print(time.strftime('%H:%M'), futures[future], future.result(), flush=True)
    finally: pool.shutdown(cancel_futures=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default='fast', help="'fast', 'laptop', or a .json file of fields (default fast)")
    parser.add_argument('--set', action='append', default=[], metavar='FIELD=VALUE', help='change a field of the recipe; may be repeated')
    parser.add_argument('--variant', action='append', default=[], metavar='FIELD=VALUE,...',
                        help='compare the recipe with this variant, in place of leaving out each part; may be repeated')
    parser.add_argument('--seeds', type=int, default=3, help='number of seeds, starting at 42 (default 3)')
    parser.add_argument('--hold-out', type=int, default=10_000, metavar='N', help='hold out N training images to test on (default 10,000)')
    parser.add_argument('--half', action='store_true', help='halve height and width of the images')
    parser.add_argument('--jobs', type=int, default=1, help='number of runs in parallel (default 1)')
    parser.add_argument('--data', default='cifar10', help="'cifar10', 'shapes', or a folder of images (default cifar10)")
    parser.add_argument('--root', help='folder of the CIFAR-10 files')
    parser.add_argument('--limit', type=int, help='use at most this many training images, those held out included')
    parser.add_argument('--keep', help='folder for the trained models, FOLDER/VARIANT/seed-42/model.safetensors')
    parser.add_argument('--out', type=Path, help='also write the result to this .json file, updated after each run')
    args = parser.parse_args()
    if args.jobs < 1: raise SystemExit(f'--jobs: found {args.jobs}, expected 1 or more')
    if any(part.startswith('seed=') for text in [*args.set, *args.variant] for part in COMMA.split(text)):
        raise SystemExit('--set, --variant: found seed=, expected another field; the seeds are 42, 43, ..., and --seeds says how many')
    args.threads = max(1, torch.get_num_threads() // args.jobs)
    sets(args)  # says what is wrong with the data before anything is written
    config = settled(args, changed(_config(args.config), args.set))
    recipes = asked_for(config, args.variant) if args.variant else variants(config)
    runs = before(args, recipes)
    save(args, runs, recipes)
    train_all(args, runs, recipes)
    print(json.dumps({name: value for name, value in save(args, runs, recipes).items() if name not in ('trained', 'question')}, indent=1))


if __name__ == '__main__': main()
