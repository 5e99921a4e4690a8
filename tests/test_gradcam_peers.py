"""The CAM methods against pytorch-grad-cam 1.5.7 and captum 0.9.0, on networks with random weights and batch statistics
that are not 0 and 1.

In float64 both sides agree to 1e-6, which settles the formulas. In float32 the tolerance is for rounding, which
stretching a nearly uniform map to 0..1 magnifies: there the peer is up to 1e-5 from its own result in float64, so ours
is held to the nearer of the two. Where the peers disagree, after a layer whose output is changed in place, captum is
right."""
import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn as nn

from eva_session9.gradcam import METHODS, GradCAM, GradCAMPlusPlus, Heatmaps
from eva_session9.models.resnet import resnet18

peer = pytest.importorskip('pytorch_grad_cam', reason='needs grad-cam, of the dev extra')
captum = pytest.importorskip('captum.attr', reason='needs captum, of the dev extra')
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # noqa: E402


def randomised(model):
    "The network in eval mode with batch statistics and affine parameters drawn at random."
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


@pytest.fixture(scope='module')
def networks():
    "Name -> network, layers that a ReLU ends, size of the images (not square: nothing may depend on it)."
    from torchvision.models import resnet18 as torchvision_resnet18, vgg11
    torch.manual_seed(0)
    vgg = vgg11(num_classes=10)
    vgg.classifier = nn.Linear(512 * 7 * 7, 10)  # its own has 120 million weights
    return {'cifar': (randomised(resnet18()), ['layer2', 'layer3', 'layer4'], (32, 24)),
            'torchvision': (randomised(torchvision_resnet18(num_classes=10)), ['layer2', 'layer3', 'layer4'], (64, 96)),
            'vgg': (randomised(vgg), ['features.9', 'features.19'], (64, 32))}


def batch(size, n):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(n)), [(3 * i + 1) % 10 for i in range(n)]


def of_peer(method, model, layers, images, classes, dtype=torch.float64):
    "Maps by pytorch-grad-cam: of each layer, (N, L, H, W), and of all averaged, (N, H, W)."
    model = copy.deepcopy(model).to(dtype)
    cam = getattr(peer, method)(model, [model.get_submodule(layer) for layer in layers])
    average, cam.aggregate_multi_layers = cam.aggregate_multi_layers, lambda per_layer: per_layer
    per_layer = cam(images.to(dtype), None if classes is None else [ClassifierOutputTarget(c) for c in classes])
    maps = torch.stack([torch.from_numpy(average([maps])) for maps in per_layer], 1)
    return maps, torch.from_numpy(average(per_layer))


@pytest.mark.parametrize('n', [1, 5])
@pytest.mark.parametrize('network', ['cifar', 'torchvision', 'vgg'])
@pytest.mark.parametrize('method, tolerance', [
    ('GradCAM', 5e-6), ('HiResCAM', 5e-6), ('LayerCAM', 5e-6), ('XGradCAM', 1e-5), ('GradCAMPlusPlus', 1e-5)])
def test_gradient_methods_agree_with_pytorch_grad_cam(networks, network, method, tolerance, n):
    model, layers, size = networks[network]
    images, classes = batch(size, n)
    options = {'eps': 1e-6} if method == 'GradCAMPlusPlus' else {}
    method_class = GradCAMPlusPlus if options else METHODS[method]
    maps, mean = of_peer(method, model, layers, images, classes, torch.float64)
    exact = method_class(copy.deepcopy(model).double(), layers, **options)(images.double(), classes)
    torch.testing.assert_close(exact.maps, maps, rtol=0, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(exact.fuse(), mean, rtol=0, atol=1e-6, check_dtype=False)

    maps32, mean32 = of_peer(method, model, layers, images, classes, torch.float32)
    ours = method_class(model, layers, **options)(images, classes)
    assert min((ours.maps - maps).abs().max(), (ours.maps - maps32).abs().max()) < tolerance
    assert min((ours.fuse() - mean).abs().max(), (ours.fuse() - mean32).abs().max()) < tolerance


class OnGrid(nn.Module):
    "As in the notebook of Grad-CAM: the patches of a transformer's layer pass through `grid` as (N, C, h, w)."
    def __init__(self, layer):
        super().__init__()
        self.layer, self.grid = layer, nn.Identity()

    def forward(self, x):
        first, patches = self.layer(x).split_with_sizes([1, x.shape[1] - 1], 1)
        side = int(patches.shape[1]**0.5)
        return torch.cat([first, self.grid(patches.mT.unflatten(2, (side, side))).flatten(2).mT], 1)


def test_maps_of_a_transformer_agree_with_its_reshape_transform():
    from torchvision.models import VisionTransformer
    torch.manual_seed(0)
    vit = VisionTransformer(image_size=32, patch_size=4, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10)
    vit.double().eval()
    nn.init.normal_(vit.heads.head.weight)
    images, classes = batch((32, 32), 5)
    images, last = images.double(), vit.encoder.layers[-1]
    cam = peer.GradCAM(vit, [last.ln_1], reshape_transform=lambda tokens: tokens[:, 1:].mT.unflatten(2, (8, 8)))
    expected = torch.from_numpy(cam(images, [ClassifierOutputTarget(c) for c in classes]))
    last.ln_1 = OnGrid(last.ln_1)
    maps = GradCAM(vit, last.ln_1.grid)(images, classes).maps[:, 0]
    assert maps.flatten(1).amax(1).min() > 0.9
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-6, check_dtype=False)


def test_the_prediction_is_the_default_of_both(networks):
    model, layers, size = networks['cifar']
    images, _ = batch(size, 5)
    with torch.no_grad(): predicted = model(images).argmax(1)
    ours = GradCAM(model, 'layer3')(images)
    expected = of_peer('GradCAM', model, ['layer3'], images, None)[0]
    torch.testing.assert_close(ours.maps, expected, rtol=0, atol=5e-6)
    assert ours.target.equal(predicted)


@pytest.mark.parametrize('n', [1, 5])
@pytest.mark.parametrize('network', ['cifar', 'torchvision', 'vgg'])
def test_eigen_cam_agrees_up_to_sign(networks, network, n):
    model, layers, size = networks[network]
    images, classes = batch(size, n)
    ours = METHODS['EigenCAM'](model, layers)(images, classes)
    flipped = Heatmaps({name: -raw for name, raw in ours.raw.items()}, ours.size, ours.logits, ours.target)
    expected, mean = of_peer('EigenCAM', model, layers, images, classes)
    apart = torch.stack([(heatmaps.maps - expected).abs().amax((2, 3)) for heatmaps in (ours, flipped)])
    assert apart.amin(0).max() < 1e-4
    sign = torch.where(apart[0] <= apart[1], 1, -1)[..., None, None]  # of each image and layer, as the peer has it
    signed = {name: sign[:, i] * raw for i, (name, raw) in enumerate(ours.raw.items())}
    assert (Heatmaps(signed, ours.size, ours.logits, ours.target).fuse() - mean).abs().max() < 1e-4


@pytest.mark.parametrize('network, layers, size, n', [
    ('cifar', ['layer2'], (16, 12), 5), ('cifar', ['layer2', 'layer3', 'layer4'], (16, 12), 1),
    ('torchvision', ['layer2', 'layer3'], (32, 48), 1), ('vgg', ['features.9'], (32, 32), 1)])
def test_score_cam_agrees(networks, network, layers, size, n):
    model = networks[network][0]
    images, classes = batch(size, n)
    ours = METHODS['ScoreCAM'](model, layers)(images, classes)
    expected, mean = of_peer('ScoreCAM', model, layers, images, classes, torch.float32)
    torch.testing.assert_close(ours.maps, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.fuse(), mean, rtol=0, atol=1e-4)


@pytest.mark.parametrize('layer', ['layer3', 'layer4'])
def test_ablation_cam_agrees_where_the_score_is_positive(networks, layer):
    model = networks['cifar'][0]
    images, _ = batch((16, 12), 2)
    with torch.no_grad(): score, classes = model(images).max(1)
    assert (score > 0).all()
    ours = METHODS['AblationCAM'](model, layer)(images, classes)
    expected = of_peer('AblationCAM', model, [layer], images, classes.tolist(), torch.float32)[0]
    torch.testing.assert_close(ours.maps, expected, rtol=0, atol=1e-3)  # weights: small differences of float32 logits


@pytest.mark.parametrize('n', [1, 5])
@pytest.mark.parametrize('network, layers', [
    ('cifar', ['layer2', 'layer3', 'layer4', 'layer2.1.bn2']),
    ('torchvision', ['layer2', 'layer3', 'layer4', 'layer3.1.bn2', 'layer4.1.bn2']),  # an addition in place follows bn2
    ('vgg', ['features.8', 'features.9', 'features.18', 'features.19'])])             # a ReLU in place follows 8 and 18
def test_raw_maps_agree_with_captum(networks, network, layers, n):
    model, _, size = networks[network]
    images, classes = batch(size, n)
    ours = GradCAM(model, layers)(images, classes)
    for layer in layers:
        theirs = captum.LayerGradCam(model, model.get_submodule(layer)).attribute(images, target=classes)
        torch.testing.assert_close(ours.raw[layer], theirs[:, 0].detach(), rtol=0, atol=1e-6)


def test_hires_cam_agrees_with_captum(networks):
    model, layers, size = networks['torchvision']
    images, classes = batch(size, 5)
    ours = METHODS['HiResCAM'](model, layers)(images, classes)
    for layer in layers:
        theirs = captum.LayerGradientXActivation(model, model.get_submodule(layer)).attribute(images, target=classes)
        torch.testing.assert_close(ours.raw[layer], theirs.sum(1).detach(), rtol=0, atol=1e-6)


def test_the_warning_for_a_shared_module_points_at_the_caller():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.fc = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2)

        def forward(self, x): return self.fc(self.relu(self.relu(self.conv(x)) - 0.1).mean((2, 3)))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        GradCAM(Shared(), 'relu')(torch.randn(1, 3, 8, 8))
    assert [w.filename for w in caught] == [__file__]


EXPLAIN_ON_ONE_RANK = '''
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from eva_session9.gradcam import GradCAM, deletion
rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group('gloo', init_method=f'file://{sys.argv[2]}', rank=rank, world_size=2)
torch.manual_seed(0)
body = [torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(1)]
net = torch.nn.Sequential(*body, torch.nn.Flatten(), torch.nn.Linear(4, 2))
model = DistributedDataParallel(net)
images = torch.randn(2, 3, 8, 8)
def refuse(*_): raise AssertionError('the wrapper was run, which waits for the other rank')
if rank == 0:
    refused = model.register_forward_pre_hook(refuse)
    heatmaps = GradCAM(model, '0')(images, 1)
    assert heatmaps.maps.equal(GradCAM(net, '0')(images, 1).maps)
    assert all(p.grad is None for p in model.parameters())
    curve = deletion(model, images, heatmaps.maps[:, 0], heatmaps.target, steps=2)
    assert curve.equal(deletion(net, images, heatmaps.maps[:, 0], heatmaps.target, steps=2))
    refused.remove()
model(images).sum().backward()                      # and both ranks still train together
print('done', flush=True)                           # what gloo does as it is taken down is not the question
dist.barrier()
dist.destroy_process_group()
'''


def test_one_rank_of_two_can_explain(tmp_path):
    command = [sys.executable, '-c', EXPLAIN_ON_ONE_RANK]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    store, options = str(tmp_path / 'store'), {'stdout': subprocess.PIPE, 'text': True, 'env': environment}
    ranks = [subprocess.Popen([*command, str(rank), store], **options) for rank in (0, 1)]
    try:
        assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == ['done', 'done']
    finally:
        for rank in ranks: rank.kill()
