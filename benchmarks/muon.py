"""Time of Muon's Newton-Schulz orthogonalisation for a network, on this machine: on Gram matrices against the plain iteration.

Both run three iterations with the same coefficients on the same random matrices, one for each convolution that Muon trains,
batched by shape. The plain iteration multiplies the full matrices in each iteration. The two take turns in one process.
"""
import argparse
import json
import shlex
import statistics
import time
from pathlib import Path

import torch

from eva_session9.config import hardware, pick_device, versions
from eva_session9.models.resnet import ARCHITECTURES, make_model
from eva_session9.optim import Muon, orthogonal
from eva_session9.save_load import write_atomically


def plain(matrices):
    "Three rounds on the matrices themselves."
    x, tall = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7), matrices.shape[1] > matrices.shape[2]
    if tall: x = x.mT
    for _ in range(3):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype)


def stacks(architecture, device):
    "Random matrices in place of the filters that Muon trains, those of one shape in one tensor."
    optimizer = Muon(make_model(architecture, 10), 0.1, lr=0.1)
    shapes = [(len(p), p[0].numel()) for group in optimizer.param_groups if group['muon'] for p in group['params']]
    torch.manual_seed(0)
    return [torch.randn(shapes.count(shape), *shape, device=device) for shape in dict.fromkeys(shapes)]


def milliseconds(iteration, matrices):
    "Of one call for each stack."
    start = time.perf_counter()
    for stack in matrices: iteration(stack)
    if matrices[0].is_cuda: torch.cuda.synchronize()
    return round(1000 * (time.perf_counter() - start), 2)


def compared(matrices, dtype, rounds):
    "Both iterations in one type, and how far apart their results are at most, by the norm of the plain one's."
    device = matrices[0].device.type
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        apart = max(((orthogonal(x) - plain(x)).norm() / plain(x).norm()).item() for x in matrices)
        taken = {'plain iteration': [], 'on Gram matrices': []}
        for _ in range(rounds):
            for times, iteration in zip(taken.values(), (plain, orthogonal)): times.append(milliseconds(iteration, matrices))
    before, after = map(statistics.median, taken.values())
    return {'ratio': round(before / after, 2), 'median_ms': {'plain iteration': before, 'on Gram matrices': after},
            'relative_difference': float(f'{apart:.1e}'), 'milliseconds': taken}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--architecture', default='resnet18', choices=ARCHITECTURES,
                        help='network whose convolution shapes are used (default resnet18)')
    parser.add_argument('--rounds', type=int, default=9, help='timed calls of each, of which the median is reported (default 9)')
    parser.add_argument('--out', type=Path, help='also write the result to this .json file')
    args, start = parser.parse_args(), time.perf_counter()
    device = pick_device()
    matrices = stacks(args.architecture, device)
    result = {name: compared(matrices, dtype, args.rounds) for name, dtype in (('bf16', torch.bfloat16), ('fp32', torch.float32))}
    result |= {'seconds': round(time.perf_counter() - start, 1), 'hardware': hardware(device), 'versions': versions(),
               'command': shlex.join(['python', 'benchmarks/muon.py', '--architecture', args.architecture, '--rounds', str(args.rounds)])}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out: write_atomically(args.out, text.encode() + b'\n')


if __name__ == '__main__': main()
