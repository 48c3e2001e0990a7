"""`src/model.py`: every feature of the U-Net is seen at work, and the parts equal their formulae."""

import math
import shutil
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torch import Tensor, nn

from src import model as model_module
from src.data import datasets
from src.diffusion import Diffusion
from src.model import Attention, Norm, ResnetBlock, TimeEmbedding, UNet


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def awake(**options) -> UNet:
    """A U-Net as it is after some training: the last layer, at first zero, lets the others be seen."""
    torch.manual_seed(0)
    unet = UNet(**options)
    nn.init.normal_(unet.conv_out.weight, std=0.1)
    return unet


@pytest.fixture(scope="module")
def unet() -> UNet:
    """With the default arguments, for reading only."""
    return awake().eval().requires_grad_(False)


def maps_attended(unet: UNet) -> Counter:
    """How often self-attention ran on a map of each (height, width), in one forward pass."""
    seen, hooks = Counter(), []
    for module in unet.modules():
        if isinstance(module, Attention):
            hooks.append(module.register_forward_hook(lambda _, x, y: seen.update([tuple(x[0].shape[2:])])))
    unet(torch.zeros(1, unet.channels, unet.image_size, unet.image_size), torch.tensor([0]))
    for hook in hooks:
        hook.remove()
    return seen


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- size ------------------------------------------------------------------------------------------------


def test_default_network_has_about_two_million_parameters(unet):
    assert 1.8e6 < parameters(unet) < 2.4e6


def test_dense_convolutions_throughout_would_cost_three_times_as_much(monkeypatch):
    """Negative control: it is the separable convolutions, and no narrower level, that keep the network small."""
    monkeypatch.setattr(model_module, "LARGEST_SEPARABLE", 0)
    assert parameters(UNet()) > 7e6


# ---- structure -------------------------------------------------------------------------------------------


def test_four_levels_double_the_width_and_halve_the_map(unet):
    shapes, hooks = [], []
    for level in [*unet.down, *reversed(unet.up)]:
        hooks.append(level.register_forward_hook(lambda _, x, y: shapes.append(tuple(y.shape[1:]))))
    unet(noise(1, 1, 32, 32), torch.tensor([5]))
    for hook in hooks:
        hook.remove()
    down = [(32, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4)]
    assert shapes == down + down[::-1]


def test_maps_shrink_by_strided_and_grow_by_transposed_convolutions(unet):
    assert [type(layer) for layer in unet.downsample] == [nn.Conv2d] * 3
    assert [type(layer) for layer in unet.upsample] == [nn.ConvTranspose2d] * 3
    assert all(layer.stride == (2, 2) for layer in [*unet.downsample, *unet.upsample])
    strided = [m for m in unet.modules() if getattr(m, "stride", (1, 1)) != (1, 1)]
    assert len(strided) == 6  # and nothing else changes a map's size
    assert not any("Pool" in type(m).__name__ or isinstance(m, nn.Upsample) for m in unet.modules())


def test_attention_runs_on_16x16_and_8x8_and_in_the_middle_on_4x4(unet):
    assert maps_attended(unet) == {(16, 16): 2, (8, 8): 2, (4, 4): 1}  # down and up; the last is the middle's
    assert isinstance(unet.middle_attention, Attention)


def test_attention_follows_the_resnet_block_of_each_level_both_ways(unet):
    ran, hooks = [], []
    for module in unet.modules():
        if isinstance(module, ResnetBlock | Attention):
            hooks.append(module.register_forward_hook(lambda m, x, y: ran.append((type(m).__name__[0], y.shape[-1]))))
    unet(noise(1, 1, 32, 32), torch.tensor([5]))
    for hook in hooks:
        hook.remove()
    down = [("R", 32), ("R", 16), ("A", 16), ("R", 8), ("A", 8), ("R", 4)]
    up = [("R", 4), ("R", 8), ("A", 8), ("R", 16), ("A", 16), ("R", 32)]
    assert ran == [*down, ("R", 4), ("A", 4), ("R", 4), *up]


def test_without_encoder_attention_the_network_is_that_of_older_checkpoints():
    """Same names of the same weights, less those of the attention on the way down."""
    whole, older = UNet(dim=8), UNet(dim=8, encoder_attention=False)
    assert maps_attended(older) == {(16, 16): 1, (8, 8): 1, (4, 4): 1}
    names = set(whole.state_dict()) - set(older.state_dict())
    assert {name.split(".")[0] for name in names} == {"down_attention"}
    assert set(older.state_dict()) < set(whole.state_dict())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"image_size": 64, "dim_mults": (1, 2, 4, 8)}, {(16, 16): 2, (8, 8): 3}),  # whose middle is at 8×8
        ({"image_size": 40, "dim_mults": (1, 2, 4, 8)}, {(10, 10): 2, (5, 5): 1}),
        ({"image_size": 16, "dim_mults": (1, 2, 4)}, {(16, 16): 2, (8, 8): 2, (4, 4): 1}),
        ({"image_size": 32, "dim_mults": (1, 2)}, {(16, 16): 3}),
        ({"image_size": 28, "dim_mults": (1, 2)}, {(14, 14): 3}),
    ],
)
def test_attention_follows_the_size_of_the_map_and_not_the_level(options, expected):
    assert maps_attended(UNet(dim=8, **options)) == expected


def test_attention_has_a_head_for_every_64_channels(unet):
    heads = {m.qkv.in_channels: m.heads for m in unet.modules() if isinstance(m, Attention)}
    assert heads == {64: 1, 128: 2, 256: 4}


def test_middle_is_two_resnet_blocks_around_attention_at_the_lowest_resolution(unet):
    ran, hooks = [], []
    for module in unet.modules():
        if isinstance(module, ResnetBlock | Attention):
            hooks.append(module.register_forward_hook(lambda m, x, y: ran.append((type(m), tuple(y.shape[1:])))))
    unet(noise(1, 1, 32, 32), torch.tensor([5]))
    for hook in hooks:
        hook.remove()
    lowest = (256, 4, 4)
    block, attention = (ResnetBlock, lowest), (Attention, lowest)
    down, middle, up = [block], [block, attention, block], [block]
    assert [entry for entry in ran if entry[1] == lowest] == down + middle + up
    down_and_up = [entry for entry in ran if entry[0] is ResnetBlock and entry[1] != lowest]
    assert len(down_and_up) == 6  # each of the other levels has its own


def test_every_normalisation_is_group_norm(unet):
    norms = [m for m in unet.modules() if "Norm" in type(m).__name__]
    blocks, attentions = (sum(isinstance(m, kind) for m in unet.modules()) for kind in (ResnetBlock, Attention))
    assert len(norms) == 2 * blocks + attentions + 1
    assert all(isinstance(m, nn.GroupNorm) for m in norms)


def test_statistics_of_normalisation_are_taken_in_float32(monkeypatch):
    """In bfloat16, with its 8 bits, a mean of 100 is off by up to 0.25, and so would be every pixel.

    torch's own kernel sums up in float32 on a CPU whatever it is given, so that there our cast moves nothing but the
    last rounding. It promises that nowhere, so a kernel that computes in the precision of its input stands in, too.
    """
    x = (100 + noise(2, 16, 8, 8)).bfloat16()
    exact = group_norm(x.double(), 8, torch.ones(16).double(), torch.zeros(16).double())
    formula = lambda x, groups, weight, bias, eps: group_norm(x, groups, weight.to(x), bias.to(x))  # noqa: E731
    for kernel in (F.group_norm, formula):
        monkeypatch.setattr(F, "group_norm", kernel)
        normed = Norm(16)(x)
        assert normed.dtype == torch.bfloat16
        torch.testing.assert_close(normed.double(), exact, rtol=2**-8, atol=2**-8)
    assert (
        nn.GroupNorm(8, 16)(x).double() - exact
    ).abs().max() > 0.02  # negative control: the formula, without a cast


@pytest.mark.parametrize("level", range(4))
def test_each_level_up_reads_what_its_level_down_wrote(unet, level):
    seen = {}
    hooks = [
        unet.down_attention[level].register_forward_hook(lambda m, x, y: seen.update(wrote=y)),
        unet.up[level].register_forward_hook(lambda m, x, y: seen.update(read=x[0])),
    ]
    unet(noise(2, 1, 32, 32), torch.tensor([5, 900]))
    for hook in hooks:
        hook.remove()
    width = seen["wrote"].shape[1]
    assert seen["read"].shape[1] == 2 * width  # concatenated, not added
    assert torch.equal(seen["read"][:, width:], seen["wrote"])


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("half", [0, 1])  # what came up from below, and the skip
def test_zeroing_either_half_of_a_concatenation_changes_the_output(unet, level, half):
    def cut(module, inputs):
        h, emb = inputs
        halves = list(h.chunk(2, dim=1))
        halves[half] = torch.zeros_like(halves[half])
        return torch.cat(halves, dim=1), emb

    x_t, t = noise(1, 1, 32, 32), torch.tensor([300])
    whole = unet(x_t, t)
    hook = unet.up[level].register_forward_pre_hook(cut)
    without = unet(x_t, t)
    hook.remove()
    assert (whole - without).norm() > 0.01 * whole.norm()


# ---- parts against their formulae ------------------------------------------------------------------------


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """Wu & He 2018, eq. 1, written out."""
    z = x.reshape(len(x), groups, -1)
    z = (z - z.mean(dim=2, keepdim=True)) / (z.var(dim=2, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return z.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]


def shaken(module: nn.Module) -> nn.Module:
    """The same with random weights and biases, so that none of them is a 0 or 1 which hides a mistake."""
    torch.manual_seed(1)
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module.requires_grad_(False)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_is_softmax_of_qk_over_sqrt_d_times_v(heads, monkeypatch):
    channels, d = 32, 32 // heads
    monkeypatch.setattr(model_module, "HEAD_WIDTH", d)
    attention, x = shaken(Attention(channels)), noise(3, channels, 4, 6)
    assert attention.heads == heads

    def linear(layer: nn.Conv2d, z: Tensor) -> Tensor:  # a 1×1 convolution, pixel by pixel
        return torch.einsum("oc, bcp -> bop", layer.weight[:, :, 0, 0], z) + layer.bias[:, None]

    pixels = group_norm(x, 8, attention.norm.weight, attention.norm.bias).flatten(2)  # (B, C, P)
    q, k, v = linear(attention.qkv, pixels).view(3, 3, heads, d, 24).unbind(dim=1)  # (B, heads, d, P) each
    share = (torch.einsum("bndp, bndq -> bnpq", q, k) / math.sqrt(d)).softmax(dim=-1)
    h = torch.einsum("bnpq, bndq -> bndp", share, v).reshape(3, channels, 24)
    expected = x + linear(attention.out, h).view_as(x)
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-4)

    attention.heads = {1: 2, 2: 1, 4: 1}[heads]  # negative control: how the channels are cut into heads matters
    assert (attention(x) - expected).abs().max() > 0.01


@pytest.mark.parametrize("resolution", [16, 8])
def test_resnet_block_equals_its_formula(resolution):
    """Two times a 3×3 convolution, GroupNorm and SiLU; the time as scale and shift; a 1×1 convolution beside."""
    block = shaken(ResnetBlock(16, 24, 10, resolution, dropout=0.0))
    x, emb = noise(2, 16, resolution, resolution), noise(2, 10, seed=1)

    def silu(z: Tensor) -> Tensor:
        return z / (1 + (-z).exp())

    def norm(layer: nn.GroupNorm, z: Tensor) -> Tensor:
        return group_norm(z, 8, layer.weight, layer.bias)

    time = silu(emb) @ block.time.weight.T + block.time.bias  # (B, 2·24)
    scale, shift = time[:, :24, None, None], time[:, 24:, None, None]
    h = silu(norm(block.norm1, block.conv1(x)) * (1 + scale) + shift)
    h = silu(norm(block.norm2, block.conv2(h)))
    beside = torch.einsum("oc, bchw -> bohw", block.skip.weight[:, :, 0, 0], x) + block.skip.bias[:, None, None]
    torch.testing.assert_close(block(x, emb), beside + h, rtol=1e-4, atol=1e-4)


def test_separable_convolution_is_a_3x3_convolution_of_low_rank():
    """Depthwise then 1×1 equals the dense 3×3 convolution whose kernel is their product."""
    layer = shaken(model_module.conv3x3(8, 12, resolution=8))
    depthwise, pointwise = layer
    kernel = torch.einsum("oc, chw -> ochw", pointwise.weight[:, :, 0, 0], depthwise.weight[:, 0])
    assert kernel.shape == (12, 8, 3, 3)
    x = noise(2, 8, 8, 8)
    torch.testing.assert_close(layer(x), F.conv2d(x, kernel, pointwise.bias, padding=1), rtol=1e-4, atol=1e-4)
    assert model_module.conv3x3(8, 12, resolution=16).weight.shape == kernel.shape  # on larger maps it is dense


@pytest.mark.parametrize("dim", [8, 32, 64])
def test_time_embedding_is_sinusoidal(dim):
    """sin and cos of t / 10000^(i / (dim/2)), i = 0, 1, …, against Python's floats."""
    embedding, seen = TimeEmbedding(dim, 16), []
    embedding.layers.register_forward_hook(lambda m, x, y: seen.append(x[0]))
    times = [0, 1, 2, 500, 999]
    embedding(torch.tensor(times))
    for t, row in zip(times, seen[0].tolist(), strict=True):
        angles = [t / 10_000 ** (i / (dim // 2)) for i in range(dim // 2)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert row == pytest.approx(expected, abs=2e-4)  # float32 knows an angle of 999 to 6e-5


def test_time_changes_the_output_through_every_block(unet):
    x_t = noise(1, 1, 32, 32).expand(3, -1, -1, -1)
    a, b, c = unet(x_t, torch.tensor([10, 11, 900]))
    assert 0 < (a - b).norm() < (a - c).norm()  # and neighbouring times are neighbours
    for block in (m for m in unet.modules() if isinstance(m, ResnetBlock)):
        hook = block.time.register_forward_hook(lambda m, x, y: torch.zeros_like(y))
        deaf = unet(x_t[:1], torch.tensor([10]))
        hook.remove()
        assert (deaf[0] - a).norm() > 1e-3 * a.norm()


# ---- behaviour -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 64, "channels": 3},
        {"image_size": 16, "channels": 1, "dim_mults": (1, 2)},
        {"image_size": 48, "channels": 2, "dim_mults": (1, 2, 3)},
        {"image_size": 8, "channels": 1, "dim_mults": (1,)},
        {"image_size": 32, "channels": 1, "dim_mults": (2, 3)},  # no level as wide as the first convolution
    ],
)
def test_other_sizes_widths_and_channels_work(options):
    unet = UNet(dim=8, **options)
    shape = (2, options["channels"], options["image_size"], options["image_size"])
    assert unet(noise(*shape), torch.tensor([0, 999])).shape == shape


def test_heads_divide_every_width_that_group_norm_allows():
    """Any multiple of 8 is a legal UNET_DIM, and 112 channels are not to be cut into three heads."""
    assert [width for width in range(8, 513, 8) if width % Attention(width).heads] == []


def test_first_prediction_is_zero():
    unet = UNet(dim=8)
    assert torch.count_nonzero(unet(noise(2, 1, 32, 32), torch.tensor([0, 999]))) == 0


def test_gradients_reach_every_parameter_after_one_step():
    """At the start the last layer is 0 and lets only its own gradient pass; from the second step on all learn.

    With 8 channels, each group of a GroupNorm has one, and the gradient of a bias before it is only rounding.
    """
    torch.manual_seed(0)
    unet, x_t, eps, t = UNet(dim=16), noise(4, 1, 32, 32), noise(4, 1, 32, 32, seed=1), torch.tensor([1, 50, 400, 999])
    optimizer, moved = torch.optim.SGD(unet.parameters(), lr=0.1), []
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(unet(x_t, t), eps).backward()
        optimizer.step()
        moved.append({name for name, p in unet.named_parameters() if p.grad is not None and p.grad.any()})
    assert moved[0] == {"conv_out.weight", "conv_out.bias"}
    assert moved[1] == {name for name, _ in unet.named_parameters()}


def test_an_images_output_does_not_depend_on_its_neighbours(unet):
    x_t, t = noise(3, 1, 32, 32), torch.tensor([5, 500, 999])
    together = unet(x_t, t)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], unet(x_t[i : i + 1], t[i : i + 1]), rtol=1e-3, atol=1e-4)
    x_t.requires_grad_()
    unet(x_t, t)[1].sum().backward()
    assert x_t.grad[1].any()
    assert not x_t.grad[[0, 2]].any()  # exactly 0


def test_one_timestep_serves_the_whole_batch(unet):
    x_t = noise(3, 1, 32, 32)
    one = unet(x_t, torch.tensor([7]))
    torch.testing.assert_close(one, unet(x_t, torch.full((3,), 7)), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(one, unet(x_t, torch.tensor([7, 7, 8])), rtol=1e-3, atol=1e-4)


def test_every_pixel_sees_every_other(unet):
    """Through the middle's attention, and because 4×4 maps and 3×3 kernels leave no corner out."""
    x_t = noise(1, 1, 32, 32).requires_grad_()
    unet(x_t, torch.tensor([300]))[0, 0, 0, 0].backward()
    assert x_t.grad.count_nonzero() == 32 * 32


def test_channels_last_changes_nothing(unet):
    """The layout in which training and sampling run."""
    x_t, t = noise(2, 1, 32, 32), torch.tensor([5, 900])
    other = awake().eval().to(memory_format=torch.channels_last)
    torch.testing.assert_close(other(x_t, t), unet(x_t, t), rtol=1e-3, atol=1e-4)


def test_network_learns_eight_real_images(tmp_path):
    """With t and eps fixed the noise can be learned by heart: from 1, a zero predictor's loss, towards 0."""
    for file in TINY.glob("*.gz"):
        shutil.copy(file, tmp_path)
    images, _ = datasets.load("fashion-mnist-tiny", tmp_path, "train", image_size=32)
    x0, eps = datasets.normalise(images[:8]), noise(8, 1, 32, 32)
    t = torch.linspace(100, 900, 8).long()
    torch.manual_seed(0)
    unet, diffusion = UNet(dim=8), Diffusion(1000, "cosine")
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = diffusion.loss(unet, x0, t, eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - 1) < 4.5 * math.sqrt(2 / eps.numel())  # 4.5 standard errors of the mean of eps²
    assert losses[-1] < 0.05
