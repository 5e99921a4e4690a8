"""Training speed of a GPU with the course's recipe and the fast one: seconds for all epochs, and the share of peak throughput.

Each recipe is trained on 50,000 random 32 x 32 images in GPU memory, which takes as long as CIFAR-10 would. First one epoch, in
which kernels are compiled and chosen and whose time is given separately; then a whole run with a new network. The arithmetic
throughput (convolutions and linear layer, forward and backward) is given as a share of that of the fastest bfloat16 product of two
large matrices, measured in the same process just before.
"""
import argparse
import json
import shlex
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from augment import random_images
from reproduce import unfinished
from eva_session9.cli import _config
from eva_session9.config import hardware, pick_device, seed_everything, versions
from eva_session9.engine import fit, test
from eva_session9.models.resnet import make_model
from eva_session9.preprocessing import recipe_batches
from eva_session9.save_load import write_atomically

MULTIPLY_ADDS = 555_422_720  # of ResNet-18 for one image of 32 x 32, forward
FIRST = 1_769_472            # of these in the first convolution, which needs no gradient for the image
OPERATIONS = 6 * MULTIPLY_ADDS - 2 * FIRST  # a training step needs for one image


def seconds(work):
    start = time.perf_counter()
    done = work()
    torch.cuda.synchronize()
    return time.perf_counter() - start, done


def matmul_peak(n=8192, repeats=20):
    "Operations per second of the fastest of some bfloat16 matrix products."
    a, b = torch.randn(2, n, n, device='cuda', dtype=torch.bfloat16)
    times = [seconds(lambda: a @ b)[0] for _ in range(repeats)]
    return 2 * n**3 / min(times)


def trained(config, batches):
    "A whole run of the recipe, and the network."
    seed_everything(config.seed)
    model = make_model(config.architecture, 10)
    return model, fit(model, batches, None, config, 'cuda')


def measured(name, images, peak):
    "Times of one recipe."
    config = replace(_config(name), batched=True, compile=True, precision='bf16', sizes=())
    if config.architecture != 'resnet18':
        raise SystemExit(f'{name}: found {config.architecture}, expected resnet18, whose operations are counted here')
    batches = recipe_batches(config, images, images)[0]
    first, _ = seconds(lambda: trained(replace(config, epochs=1), batches))
    torch.cuda.reset_peak_memory_stats()
    whole, (model, history) = seconds(lambda: trained(config, batches))
    ten_thousand = recipe_batches(config, images, images.subset(range(min(10_000, len(images)))))[1]
    test(model, ten_thousand, 'bf16')
    testing, _ = seconds(lambda: test(model, ten_thousand, 'bf16'))
    epoch = statistics.median(e['seconds'] for e in history.epochs)
    rate = len(batches) * config.batch_size / epoch
    return {'first_epoch_with_compilation': round(first, 2), 'seconds_for_all_epochs': round(whole, 2), 'epochs': config.epochs,
            'median_epoch': epoch, 'images_per_second': round(rate), 'share_of_matmul_peak': round(rate * OPERATIONS / peak, 3),
            'seconds_to_test_10000': round(testing, 3), 'memory_reserved_gib': round(torch.cuda.max_memory_reserved() / 2**30, 2),
            'epoch_seconds': [e['seconds'] for e in history.epochs], 'config': asdict(config)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('recipes', nargs='*', default=['session9', 'fast'], help='recipes to measure (default: session9 fast)')
    parser.add_argument('--images', type=int, default=50_000, help='images per epoch (default 50000)')
    parser.add_argument('--out', type=Path, help='also write the result to this .json file')
    args = parser.parse_args()
    if not torch.cuda.is_available(): parser.exit(2, 'train_gpu.py: no CUDA device is available here\n')
    torch.backends.cudnn.benchmark = True
    start, images = time.perf_counter(), random_images(args.images)
    matmul_peak(repeats=3)
    peak = matmul_peak()
    result = {'matmul_peak_tflops': round(peak / 1e12, 1), 'recipes': {}, 'hardware': hardware(pick_device('cuda')), 'versions': versions(),
              'command': shlex.join(['python', 'benchmarks/train_gpu.py', *args.recipes, '--images', str(args.images)])}
    for name in args.recipes:
        result['recipes'][name] = measured(name, images, peak)
        result['seconds'] = round(time.perf_counter() - start, 1)
        if args.out: write_atomically(unfinished(args.out), json.dumps(result, indent=1).encode() + b'\n')
        print(name, json.dumps(result['recipes'][name], indent=1), flush=True)
    if args.out: unfinished(args.out).replace(args.out)


if __name__ == '__main__': main()
