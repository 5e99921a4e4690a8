"""Which heatmaps can be trusted? Every method and layer on two data sets, against controls that use neither model nor object.

- shapes: drawn images, whose true masks are known, and a ResNet-18 trained on them here. Localisation: pointing game, energy
  in the mask, IoU at matched area, and offset of the map's centre of mass from the object's; the upper bound is the oracle of
  each grid. Class: two objects in one image, the energy on the explained one minus that on the other.
- cifar10: stratified test images and the library's current weights. Without masks, localisation is not measured.
  Faithfulness: deletion, insertion, ROAD, average drop together with the map's area. Sanity: rank correlation with the map of another
  class, and with the map of another image.
- cascade: the same images and weights. Rank correlation with the map after re-initialising the classifier, then layer4 too, and so on
  to the first convolution.

ScoreCAM and AblationCAM, which need a pass for each channel, are measured on the first 100 images of each set, on 50 pairs, and
for sanity on 20, not in the cascade. Each row is kept in --work and not measured again with the same settings, precision
and version of PyTorch, so an interrupted run resumes. Means have 95% bootstrap intervals over images; "over centre" is the mean difference
per image to a centred Gaussian. Times are measured last, best on an idle machine. Each part of the file names its machine and
command; with --only, the other parts of the file stay unchanged.
"""
import argparse
import hashlib
import json
import statistics
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eva_session9.config import Config, hardware, pick_device, seed_everything, versions
from eva_session9.data import ImageSet, cifar10, shapes
from eva_session9.engine import faster_precision, fit, forward, test
from eva_session9.gradcam import (METHODS, Heatmaps, Status, area_under, bootstrap, cascade, centre_gaussian, confidence,
                                  confidence_drop, deletion, energy_in, insertion, logit_similarity, matched_iou, oracle, pointing,
                                  road_score, spearman)
from eva_session9.gradcam.metrics import blurred
from eva_session9.models.resnet import resnet18
from eva_session9.preprocessing import as_inputs, loader, test_transforms
from eva_session9.save_load import pretrained, write_atomically

LAYERS = ['layer2', 'layer3', 'layer4']
STAGES = ['fc', 'layer4', 'layer3', 'layer2', 'layer1', 'bn1', 'conv1']  # whose weights are drawn anew, one after the other
SLOW = {'ScoreCAM', 'AblationCAM'}  # a pass for each channel: made in the faster precision, and not repeated for new weights
SOME, STEPS, FRACTIONS, SIGMA, BATCH = 100, 6, (0.3, 0.7), 5.0, 100


class Fast(torch.nn.Module):
    "A model in eval mode that answers in the faster precision, and each batch only once: every curve begins and ends alike."
    def __init__(self, model, x):
        super().__init__()
        precision = faster_precision(model, x, torch.zeros(len(x), dtype=torch.long))
        self.model, self.low, self.answers = model, precision == 'bf16', {}

    @torch.no_grad
    def forward(self, x):
        key = hashlib.sha256(x.numpy()).digest()
        if key not in self.answers: self.answers[key] = forward(self.model, x, 'bf16' if self.low else 'fp32')
        return self.answers[key]


def in_batches(function, *tensors):
    "The function's results on batches of the tensors, joined; a dictionary of tensors (N, ...) each time."
    parts = [function(*batch) for batch in zip(*(tensor.split(BATCH) for tensor in tensors))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def place(maps, masks):
    "Where the maps are, against the truth."
    rows, columns = centres(maps) - centres(masks.float())
    return {'pointing': pointing(maps, masks).float(), 'energy': energy_in(maps, masks), 'iou': matched_iou(maps, masks),
            'rows off': rows, 'columns off': columns}


def centres(maps):
    "The centre of mass of each map, row and column in pixels, (2, N); an empty map has its middle."
    weights = maps / maps.sum((1, 2), keepdim=True).clamp(min=1e-12)
    weights = torch.where(maps.flatten(1).sum(1)[:, None, None] > 0, weights, 1 / maps[0].numel())
    rows, columns = (torch.arange(n, dtype=maps.dtype) for n in maps.shape[1:])
    return torch.stack([(weights.sum(2) * rows).sum(1), (weights.sum(1) * columns).sum(1)])


def faithfulness(model, images, maps, target):
    "Whether confidence follows the maps."
    drop, grew = confidence_drop(model, images, maps, target)
    return {'deletion': area_under(deletion(model, images, maps, target, STEPS)),
            'insertion': area_under(insertion(model, images, maps, target, STEPS, SIGMA)),
            'road': road_score(model, images, maps, target, FRACTIONS),
            'drop': drop, 'increase': grew.float(), 'area': maps.mean((1, 2))}


def controls(images):
    "Maps that have seen neither the model nor the object."
    noise = torch.rand(images.shape[0], *images.shape[2:], generator=torch.Generator().manual_seed(0))
    return {'centre': centre_gaussian(images), 'random pixels': noise, 'uniform': torch.ones_like(noise)}


def explainers(model):
    "Name, layer and method, for every method on every layer where it is defined."
    for name, method in METHODS.items():
        for layer in layers_of(name): yield name, layer, method(model, layer)


def layers_of(name): return LAYERS[-1:] if name == 'CAM' else LAYERS


def explained(cam, images, target, low=False):
    "The maps, and whether each is empty."
    def explain(x, y):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low): heatmaps = cam(x, y)
        return {'maps': heatmaps.maps[:, 0], 'empty': (heatmaps.status[:, 0] != Status.OK).float()}
    found = in_batches(explain, images, target)
    return found['maps'], {'empty': found['empty']}


class Rows:
    "Measured rows, each a dictionary of tensors (N,), kept in a folder."

    def __init__(self, folder, key, low):
        self.seconds = 0.0  # that all rows took, whenever they were measured
        self.folder, self.rows = folder / (f"{key}-{SOME}-{STEPS}-{FRACTIONS}-{SIGMA}-{'bf16' if low else 'fp32'}-"
                                           f'torch-{torch.__version__}'), {}
        self.folder.mkdir(parents=True, exist_ok=True)

    def measure(self, name, layer, work):
        path, start = self.folder / f'{name} {layer}.pt', time.perf_counter()
        if not path.exists():
            torch.save({'row': work(), 'seconds': time.perf_counter() - start}, path.with_suffix('.part'))
            path.with_suffix('.part').rename(path)
        kept = torch.load(path, weights_only=True)
        self.rows[name, layer] = kept['row']
        self.seconds += kept['seconds']

    def table(self):
        "Plain data: a row each, with intervals, and differences to the centre where that was measured."
        centre = self.rows.get(('centre', ''), {})
        return [{'method': name, 'layer': layer, 'n': len(next(iter(row.values())))}
                | {measure: rounded(bootstrap(values)) for measure, values in row.items()}
                | {f'{measure} over centre': rounded(bootstrap(values - centre[measure][:len(values)]))
                   for measure, values in row.items() if measure in centre and name != 'centre'}
                for (name, layer), row in self.rows.items()]


def rounded(interval): return [round(x, 4) for x in interval]


def trained_on_shapes(folder):
    "A ResNet-18 trained on shapes, their mean and std, and the facts that show that its evidence is the shape."
    train_set, config = shapes(4000), Config(epochs=3, step_size=2, seed=0)
    mean, std = train_set.stats()
    seed_everything(config.seed)
    model, normal = resnet18(), test_transforms(mean, std)
    history = fit(model, loader(train_set, normal, config.batch_size, config.seed), None, config, 'cpu', folder, resume=True)

    def answers(**options):
        return test(model, loader(shapes(1000, seed=1, **options), normal, 250, shuffle=False), history.precision)
    plain, swapped, erased = answers(), answers(ground_seed=2), answers(erase=True)
    changed = (plain.predictions != swapped.predictions).double().mean().item()
    facts = {'accuracy': plain.accuracy, 'changed by another ground': changed, 'accuracy without the shapes': erased.accuracy}
    return model.eval().to(memory_format=torch.contiguous_format), mean, std, facts


def two_objects(images, gap=2):
    "Pairs of shapes of two classes in one image, apart by `gap` pixels: images, both masks, both labels."
    near = torch.nn.functional.max_pool2d(torch.from_numpy(images.masks).float(), 2 * gap + 1, 1, gap).bool().numpy()
    differ = images.labels[:, None] != images.labels
    apart = np.einsum('ihw,jhw->ij', near, images.masks, dtype=int) == 0
    chosen = [(i, np.roll(fits, -i).argmax() + i) for i, fits in enumerate(differ & apart) if fits.any()]
    first, second = np.array(chosen).T % len(images)
    pasted = np.where(images.masks[second][..., None], images.images[second], images.images[first])
    both = ImageSet(pasted, images.labels[first], images.classes)
    masks, labels = ([torch.from_numpy(array[k]) for k in (first, second)] for array in (images.masks, images.labels))
    return both, masks, labels


def study_shapes(n, work):
    "Place and class on drawn images."
    model, mean, std, facts = trained_on_shapes(work / 'shapes-model')
    images = shapes(n, seed=1)
    x, masks = as_inputs(images.images, mean, std), torch.from_numpy(images.masks)
    both, both_masks, both_labels = two_objects(images)
    two = as_inputs(both.images, mean, std)
    with torch.no_grad(): logits, two_logits = model(x), model(two)
    target, low = logits.argmax(1), Fast(model, x[:32]).low
    named = two_logits.topk(2).indices.sort().values == torch.stack(both_labels, 1).sort().values
    facts |= {'object share': masks.float().mean().item(), 'pairs': len(two),
              'both objects in the top two': named.all(1).float().mean().item(),
              'precision of slow methods': 'bf16' if low else 'fp32'}
    rows = Rows(work, f'shapes-{n}', low)
    for name, maps in controls(x).items(): rows.measure(name, '', lambda: place(maps, masks))
    for layer, side in zip(LAYERS, (16, 8, 4)):
        ceiling = Heatmaps({layer: oracle(masks, (side, side))}, (32, 32), logits, target).maps[:, 0]
        rows.measure('oracle', layer, lambda: place(ceiling, masks))

    def class_of_two(name, cam):
        count = SOME // 2 if name in SLOW else len(two)
        first, second = (mask[:count] for mask in both_masks)
        maps = [explained(cam, two[:count], labels[:count], low and name in SLOW)[0] for labels in both_labels]
        own = [energy_in(m, mask) - energy_in(m, other) for m, mask, other in zip(maps, (first, second), (second, first))]
        return (own[0] + own[1]) / 2

    def work_on(name, cam):
        count = SOME if name in SLOW else n
        maps, row = explained(cam, x[:count], target[:count], low and name in SLOW)
        return row | place(maps, masks[:count])
    pairs = Rows(work, f'pairs-{n}', low)
    for name, layer, cam in tqdm(list(explainers(model)), 'shapes'):
        rows.measure(name, layer, lambda: work_on(name, cam))
        pairs.measure(name, layer, lambda: {'named less other': class_of_two(name, cam)})
    return {'conditions': facts, 'place': rows.table(), 'two objects': pairs.table(), 'seconds': round(rows.seconds + pairs.seconds)}


def stratified(images, n):
    "The first n / K images of each class, in the order of the set."
    per_class = n // len(images.classes)
    chosen = [np.flatnonzero(images.labels == k)[:per_class] for k in range(len(images.classes))]
    return images.subset(np.sort(np.concatenate(chosen)))


def study_cifar10(root, n, work):
    "Faithfulness and sanity on real images."
    model, images = pretrained(), stratified(cifar10(root)[1], n)
    x = as_inputs(images.images, model.card['mean'], model.card['std'])
    fast = Fast(model, x[:32])
    target = in_batches(lambda a: {'target': fast(a).argmax(1)}, x)['target']
    hidden = in_batches(lambda a, b: {'c': confidence(fast, blurred(a, SIGMA), b)}, x, target)['c']
    facts = {'accuracy': (target.numpy() == images.labels).mean().item(), 'confidence when blurred': hidden.mean().item(),
             'sigma': SIGMA, 'precision': 'bf16' if fast.low else 'fp32'}
    rows, sanity = (Rows(work, f"{what}-{model.card['sha256'][:8]}-{n}", fast.low) for what in ('cifar10', 'sanity'))

    def faithful(maps):  # rounded: methods that agree but for the last digits are then measured once
        return in_batches(lambda *batch: faithfulness(fast, *batch), x[:len(maps)], maps.round(decimals=4), target[:len(maps)])
    for name, maps in controls(x).items(): rows.measure(name, '', lambda: faithful(maps))

    def work_on(name, cam):
        count = SOME if name in SLOW else n
        maps, row = explained(cam, x[:count], target[:count], fast.low and name in SLOW)
        return row | faithful(maps)

    def sane(name, cam, layer):
        count = SOME // 5 if name in SLOW else n // 5
        def other_class_and_image(a, b):
            raw = cam(a, b).raw[layer]
            return {'another class': logit_similarity(cam, a)[layer], 'another image': spearman(raw, raw.roll(1, 0))}
        return in_batches(other_class_and_image, x[:count], target[:count])
    for name, layer, cam in tqdm(list(explainers(model)), 'cifar10'):
        rows.measure(name, layer, lambda: work_on(name, cam))
        sanity.measure(name, layer, lambda: sane(name, cam, layer))
    return {'conditions': facts, 'faithfulness': rows.table(), 'sanity': sanity.table(), 'weights_sha256': model.card['sha256'],
            'seconds': round(rows.seconds + sanity.seconds)}


def study_cascade(root, n, work):
    "How much of each map remains when the network is drawn anew, stage by stage from the output."
    model, (train_set, test_set) = pretrained(), cifar10(root)
    mean, std = model.card['mean'], model.card['std']
    x, calibration = (as_inputs(stratified(*subset).images, mean, std) for subset in ((test_set, n), (train_set, 250)))
    target = in_batches(lambda a: {'target': forward(model, a, 'fp32').argmax(1)}, x)['target']
    rows = Rows(work, f"cascade-{'-'.join(STAGES)}-{model.card['sha256'][:8]}-{n}", False)

    def remaining(method, layers):
        cam = method(model, layers)
        raw, changed = cam(x, target).raw, cascade(cam, x, target, STAGES, calibration)
        return {layer: {'another image': spearman(raw[layer], raw[layer].roll(1, 0))}
                | {f'new {stage}': similar for stage, similar in zip(STAGES, changed[layer])} for layer in layers}
    for name, method in tqdm([(name, method) for name, method in METHODS.items() if name not in SLOW], 'cascade'):
        found = cache(partial(remaining, method, layers_of(name)))
        for layer in layers_of(name): rows.measure(name, layer, lambda: found()[layer])
    return {'conditions': {'calibration images': len(calibration)}, 'rows': rows.table(), 'weights_sha256': model.card['sha256'],
            'seconds': round(rows.seconds)}


def study_time(n=8, rounds=3):
    "An image's time by every method and layer: the median over rounds that take turns, on a batch of n, float32, weights at random."
    torch.manual_seed(0)
    x, seconds = torch.randn(n, 3, 32, 32), {}
    for _ in range(rounds):
        for name, layer, cam in explainers(resnet18().eval()):
            start = time.perf_counter()
            cam(x).maps
            seconds.setdefault((name, layer), []).append(time.perf_counter() - start)
    rows = [{'method': name, 'layer': layer, 'ms': round(1000 * statistics.median(taken) / n, 3)}
            for (name, layer), taken in seconds.items()]
    return {'rows': rows, 'seconds': round(sum(sum(taken) for taken in seconds.values()))}


def keep(path, name, part):
    "Write one part of the study; the others stay as the file has them."
    study = json.loads(path.read_text()) if path.exists() else {}
    write_atomically(path, (json.dumps(study | {name: part}, indent=1) + '\n').encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', type=int, default=500, help='number of drawn images (default 500)')
    parser.add_argument('--images', type=int, default=1000, help='CIFAR-10 test images, a multiple of 10 (default 1000)')
    parser.add_argument('--root', help='folder of the CIFAR-10 files; your cache folder if not given')
    parser.add_argument('--work', type=Path, default=Path('eva9-cam-study'),
                        help='folder for measured rows, to resume from (default eva9-cam-study)')
    parser.add_argument('--out', type=Path, default=Path('results/cam_study.json'),
                        help='.json file for the result (default results/cam_study.json)')
    parser.add_argument('--only', choices=('shapes', 'cifar10', 'cascade', 'time'), help='measure only this part')
    args = parser.parse_args()
    parts = {'shapes': (f'--shapes {args.shapes}', lambda: study_shapes(args.shapes, args.work)),
             'cifar10': (f'--images {args.images}', lambda: study_cifar10(args.root, args.images, args.work)),
             'cascade': (f'--images {args.images}', lambda: study_cascade(args.root, args.images, args.work)),
             'time': ('', study_time)}
    for name, (size, measured) in parts.items():
        if args.only in (None, name):
            command = f'python benchmarks/cam_study.py --only {name} {size}'.strip()
            keep(args.out, name, measured() | {'hardware': hardware(pick_device('cpu')), 'versions': versions(), 'command': command})
    print(args.out)


if __name__ == '__main__': main()
