"""Grad-CAM on the CIFAR ResNet-18: time against pytorch-grad-cam, captum and torchcam, and memory saved for the backward pass.

All take turns in one process on copies of one network with random weights, in float32. Each explains the predicted class and
is timed up to its own output: ours and pytorch-grad-cam's maps are upsampled to the image, captum's and torchcam's are not.
Times are medians; a ratio is the median over rounds of a library's time divided by ours. A library that is not installed is
left out. bfloat16 is compared with float32 on the library's own model and CIFAR-10 (environment variable EVA9_CIFAR10).
"""
import argparse
import copy
import json
import os
import statistics
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from eva_session9.config import hardware, pick_device, versions
from eva_session9.data import cifar10
from eva_session9.gradcam import EigenCAM, GradCAM
from eva_session9.gradcam.methods import first_component
from eva_session9.models.resnet import resnet18
from eva_session9.preprocessing import as_inputs
from eva_session9.save_load import pretrained, write_atomically

LAYERS = ['layer2', 'layer3', 'layer4']
TARGETS = {  # at least so many times our time
    ('pytorch-grad-cam', 'layer2'): 1.9, ('pytorch-grad-cam', 'layer3'): 2.3, ('pytorch-grad-cam', 'layer4'): 3.0,
    ('captum', 'layer4'): 1.9}


def network():
    "A ResNet-18 with batch statistics of its own, in eval mode."
    torch.manual_seed(0)
    model = resnet18()
    with torch.no_grad(): model(torch.randn(64, 3, 32, 32))
    return model.eval()


def peers(model):
    "Library -> what it does for (layer, images), each on a copy of the network."
    calls = {}
    if find_spec('pytorch_grad_cam'):
        from pytorch_grad_cam import GradCAM as PytorchGradCAM
        copy_1 = copy.deepcopy(model)

        def pytorch_grad_cam(layer, images):
            with PytorchGradCAM(copy_1, [copy_1.get_submodule(layer)]) as cam: return cam(images, None)
        calls['pytorch-grad-cam'] = pytorch_grad_cam
    if find_spec('captum'):
        from captum.attr import LayerGradCam
        copy_2 = copy.deepcopy(model)

        def captum(layer, images):
            with torch.no_grad(): predicted = copy_2(images).argmax(1)
            return LayerGradCam(copy_2, copy_2.get_submodule(layer)).attribute(images, target=predicted)
        calls['captum'] = captum
    if find_spec('torchcam'):
        from torchcam.methods import GradCAM as TorchCAM
        copy_3 = copy.deepcopy(model)

        def torchcam(layer, images):
            with TorchCAM(copy_3, layer) as cam:
                scores = copy_3(images)
                return cam(scores.argmax(1).tolist(), scores)
        calls['torchcam'] = torchcam
    return calls


CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}


def timed(call, clock):
    start = CLOCKS[clock]()
    call()
    return CLOCKS[clock]() - start


def in_turns(calls, rounds, clock):
    "Name -> seconds of each round, after one to warm up; each round starts with another call."
    names, seconds = list(calls), {name: [] for name in calls}
    for name in names: calls[name]()
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]: seconds[name].append(timed(calls[name], clock))
    return seconds


def ratio(numerator, denominator):
    return statistics.median(a / b for a, b in zip(numerator, denominator))


def milliseconds(seconds):
    return round(1000 * statistics.median(seconds), 2)


def verdict(found, target, at_least):
    return 'reached' if (found >= target if at_least else found <= target) else 'MISSED'


def speed(model, batch_size, rounds, clock):
    "Rows of one batch size: every layer, ours and theirs, and three layers from one pass."
    images, theirs, rows = torch.randn(batch_size, 3, 32, 32), peers(model), []
    for layer in LAYERS:
        calls = {'eva_session9': lambda: GradCAM(model, layer)(images).maps}
        calls |= {name: (lambda call=call: call(layer, images)) for name, call in theirs.items()}
        if layer == LAYERS[0]: calls['three layers'] = lambda: GradCAM(model, LAYERS)(images).maps
        if layer == LAYERS[-1]: calls['forward alone'] = lambda: forward(model, images)
        seconds = in_turns(calls, rounds, clock)
        for name, times in seconds.items():
            of_ours = round(ratio(times, seconds['eva_session9']), 2)
            row = {'batch': batch_size, 'layer': layer, 'what': name, 'ms': milliseconds(times), 'of ours': of_ours}
            least = TARGETS.get((name, layer))
            if least: row['target'] = f'>= {least}: {verdict(of_ours, least, True)}'
            if name == 'three layers': row['target'] = f'<= 1.1: {verdict(of_ours, 1.1, False)}'
            if (name, layer) == ('torchcam', 'layer4'):
                row['target'] = f'ours <= 1.05 of it: {verdict(ratio(seconds["eva_session9"], times), 1.05, False)}'
            rows.append(row)
    return rows


@torch.no_grad()
def forward(model, images):
    return model(images)


def saved_bytes(model, call):
    "Bytes that autograd keeps for a backward pass while `call` runs, weights and buffers not counted."
    own, kept = {x.data_ptr() for x in [*model.parameters(), *model.buffers()]}, {}

    def pack(x):
        if x.data_ptr() not in own: kept[x.data_ptr()] = max(x.nbytes, kept.get(x.data_ptr(), 0))
        alive.append(x)
        return x
    alive = []  # keeps addresses from being used twice
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): call()
    return sum(kept.values())


def memory(model):
    "Rows: MiB saved for backward at batch 16."
    images = torch.randn(16, 3, 32, 32)
    calls = {'whole graph': lambda: model(images)}
    calls |= {layer: (lambda layer=layer: GradCAM(model, layer)(images)) for layer in LAYERS}
    sizes = {what: saved_bytes(model, call) / 2**20 for what, call in calls.items()}
    rows = [{'batch': 16, 'what': what, 'MiB': round(size, 2)} for what, size in sizes.items()]
    rows[-1]['target'] = f'<= 0.6: {verdict(rows[-1]["MiB"], 0.6, False)}'
    return rows


def eigen(model, rounds, clock):
    "Rows: EigenCAM's projection of 64 channels at 32x32, four images, and the whole call at layer1."
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad(): activation = model.get_submodule('layer1')(model.bn1(model.conv1(images)).relu())
    calls = {'projection': lambda: first_component(activation),
             'whole call': lambda: EigenCAM(model, 'layer1')(images).maps}
    if find_spec('pytorch_grad_cam'):
        from pytorch_grad_cam import EigenCAM as PytorchEigenCAM
        from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection

        def whole_call():
            with PytorchEigenCAM(model, [model.layer1]) as cam: return cam(images, None)
        calls |= {'projection, pytorch-grad-cam': lambda: get_2d_projection(activation.numpy()),
                  'whole call, pytorch-grad-cam': whole_call}
    seconds = in_turns(calls, rounds, clock)
    rows = [{'what': f'EigenCAM, {name}', 'ms an image': round(milliseconds(times) / 4, 3),
             'of ours': round(ratio(times, seconds[name.split(',')[0]]), 1)} for name, times in seconds.items()]
    if len(rows) == 4: rows[2]['target'] = f'>= 500: {verdict(rows[2]["of ours"], 500, True)}'
    return rows


def bfloat16(model, images, rounds, clock):
    "Rows: autocast to bfloat16 in channels_last against float32, three layers: speed, and how far apart the maps are."
    low = copy.deepcopy(model).to(memory_format=torch.channels_last)
    low_images = images.to(memory_format=torch.channels_last)

    def full_maps(): return GradCAM(model, LAYERS)(images, predicted).maps

    def low_maps():
        with torch.autocast('cpu', dtype=torch.bfloat16): return GradCAM(low, LAYERS)(low_images, predicted).maps
    predicted = forward(model, images).argmax(1)
    seconds = in_turns({'float32': full_maps, 'bfloat16': low_maps}, rounds, clock)
    faster = round(ratio(seconds['float32'], seconds['bfloat16']), 2)
    rows = [{'what': 'bfloat16 against float32', 'ms': milliseconds(seconds['bfloat16']), 'times as fast': faster,
             'target': f'>= 1.5: {verdict(faster, 1.5, True)}'}]
    apart = (full_maps() - low_maps()).abs()
    for i, layer in enumerate(LAYERS):
        mean, largest = apart[:, i].mean((1, 2)), apart[:, i].amax((1, 2))
        row = {'what': f'maps apart, {layer}', 'median mean': round(mean.median().item(), 4),
               'largest mean': round(mean.max().item(), 4), 'largest': round(largest.max().item(), 4)}
        if layer == 'layer4': row['target'] = f'largest <= 0.02: {verdict(row["largest"], 0.02, False)}'
        else: row['target'] = f'median mean <= 0.01: {verdict(row["median mean"], 0.01, False)}'
        rows.append(row)
    return rows


def trained():
    "The shipped network and 64 real test images, if EVA9_CIFAR10 names their folder; else None."
    if not os.environ.get('EVA9_CIFAR10'): return None
    model, images = pretrained(), cifar10(os.environ['EVA9_CIFAR10'])[1].images[:64]
    return model, as_inputs(images, model.card['mean'], model.card['std'])


def show(rows):
    for row in rows: print('   '.join(f'{key} {value}' for key, value in row.items()), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, nargs='+', default=[16, 64], help='batch sizes (default: 16 64)')
    parser.add_argument('--rounds', type=int, default=7, help='rounds of each comparison (default: 7)')
    parser.add_argument('--threads', type=int, help="number of PyTorch threads (default: PyTorch's own choice)")
    parser.add_argument('--clock', choices=CLOCKS, default='wall', help='wall: elapsed time (default); cpu: CPU time, for a busy machine')
    parser.add_argument('--out', type=Path, help='also write the rows to this JSON file')
    args = parser.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, machine = network(), hardware(pick_device('cpu'))
    print(f'{machine}; load {os.getloadavg()[0]:.1f}; torch {torch.__version__}')
    print(f'{args.rounds} rounds, {args.clock} clock')
    sections, start, shipped = {}, time.perf_counter(), trained()
    for batch_size in args.batch:
        sections[f'speed at batch {batch_size}'] = speed(model, batch_size, args.rounds, args.clock)
        show(sections[f'speed at batch {batch_size}'])
    sections['saved for backward'] = memory(model)
    show(sections['saved for backward'])
    sections['EigenCAM'] = eigen(model, args.rounds, args.clock)
    show(sections['EigenCAM'])
    sha256 = ''
    if shipped is None:
        print('bfloat16: skipped; set EVA9_CIFAR10 to the folder of the CIFAR-10 files')
    else:
        sections['bfloat16'], sha256 = bfloat16(*shipped, args.rounds, args.clock), shipped[0].card['sha256']
        show(sections['bfloat16'])
    if args.out:
        batches = ' '.join(map(str, args.batch))
        threads = f' --threads {args.threads}' if args.threads else ''
        command = f'python benchmarks/cam.py --batch {batches} --rounds {args.rounds} --clock {args.clock}{threads}'
        result = {**sections, 'rounds': args.rounds, 'clock': args.clock, 'hardware': machine, 'versions': versions(),
                  'load': os.getloadavg()[0], 'weights_sha256': sha256, 'seconds': round(time.perf_counter() - start), 'command': command}
        write_atomically(args.out, (json.dumps(result, indent=1) + '\n').encode())


if __name__ == '__main__': main()
