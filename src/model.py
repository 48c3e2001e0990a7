"""The U-Net of DDPM (Ho et al. 2020, appendix B), reduced to 2.3 million parameters.

Comments at line ends give shapes: B images, C channels, H × W pixels, D the width of the time embedding.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# Feature maps of these heights get self-attention, and the middle always does (Ho et al.: 16, and the middle).
ATTENTION_RESOLUTIONS = range(8, 17)
LARGEST_SEPARABLE = 8  # 3×3 convolutions of ResNet blocks are depthwise-separable up to this height
HEAD_WIDTH = 64  # channels per attention head
NORM_GROUPS = 8  # groups of every GroupNorm; every width must be a multiple of it


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    """Context in which convolutions and matrix products run in `precision`; weights and gradients stay float32."""
    if precision == torch.float32:
        return nullcontext()
    # Older versions of torch would reuse a cast that was made under no_grad, as in consistency distillation, and the
    # weight would get no gradient.
    return torch.autocast(device.type, precision, cache_enabled=False)


class TimeEmbedding(nn.Module):
    """Embeds t: sinusoids of geometrically spaced frequencies (Vaswani et al. 2017, §3.5), then two linear layers."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.frequencies = nn.Buffer(torch.exp(-math.log(10_000) * torch.arange(0, dim, 2) / dim), persistent=False)
        self.layers = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None].float() * self.frequencies  # (B, dim/2)
        return self.layers(torch.cat([angles.sin(), angles.cos()], dim=1))  # (B, D)


class Norm(nn.GroupNorm):
    """Group normalisation (Wu & He 2018), computed in float32 whatever the precision of x."""

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def conv3x3(c_in: int, c_out: int, resolution: int) -> nn.Module:
    """A 3×3 convolution: dense on large feature maps, depthwise-separable on small ones.

    A dense convolution has 9·c_in·c_out weights. At 8×8 and 4×4, where the U-Net is widest, dense convolutions would
    hold three quarters of all parameters. A depthwise 3×3 and a pointwise 1×1 convolution have c_in·(c_out + 9).
    """
    if resolution > LARGEST_SEPARABLE:
        return nn.Conv2d(c_in, c_out, 3, padding=1)
    return nn.Sequential(nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False), nn.Conv2d(c_in, c_out, 1))


class ResnetBlock(nn.Module):
    """Residual block of two layers (3×3 convolution, GroupNorm, SiLU), conditioned on the time embedding.

    The embedding scales and shifts the first normalisation: adaptive group normalisation (Dhariwal & Nichol 2021, §3,
    equation AdaGN). Normalisation follows the convolution; before conv1 it would cost twice as much in the decoder.
    """

    def __init__(self, c_in: int, c_out: int, time_width: int, resolution: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.conv1 = conv3x3(c_in, c_out, resolution)
        self.norm1 = Norm(c_out)
        self.time = nn.Linear(time_width, 2 * c_out)
        self.conv2 = conv3x3(c_out, c_out, resolution)
        self.norm2 = Norm(c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.time(F.silu(emb))[:, :, None, None].chunk(2, dim=1)  # (B, c_out, 1, 1) each
        h = F.silu(torch.addcmul(shift, self.norm1(self.conv1(x)), 1 + scale))  # (B, c_out, H, W)
        return self.skip(x) + F.silu(self.norm2(self.conv2(self.dropout(h))))  # (B, c_out, H, W)


class Attention(nn.Module):
    """Residual multi-head self-attention over the pixels of a feature map (Vaswani et al. 2017, §3.2).

    It is written out because torch's fused kernel is slower on a CPU, and saves little at the default sizes.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = next(n for n in range(max(1, channels // HEAD_WIDTH), 0, -1) if channels % n == 0)  # equal widths
        self.norm = Norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = rearrange(self.qkv(self.norm(x)), "b (three n d) h w -> three b n (h w) d", three=3, n=self.heads)
        q, k, v = qkv  # (B, heads, H·W, C/heads) each
        weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)  # (B, heads, H·W, H·W), eq. 1
        return x + self.out(rearrange(weights @ v, "b n (h w) d -> b (n d) h w", h=x.shape[2]))  # (B, C, H, W)


def attention_at(resolution: int, channels: int) -> nn.Module:
    """Self-attention if the resolution is in ATTENTION_RESOLUTIONS, else the identity."""
    return Attention(channels) if resolution in ATTENTION_RESOLUTIONS else nn.Identity()


class UpLevel(nn.Module):
    """One resolution of the decoder: a ResNet block and, from 8×8 to 16×16, self-attention."""

    def __init__(self, c_in: int, c_out: int, time_width: int, resolution: int, dropout: float) -> None:
        super().__init__()
        self.block = ResnetBlock(c_in, c_out, time_width, resolution, dropout)
        self.attention = attention_at(resolution, c_out)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.attention(self.block(x, emb))  # (B, c_out, H, W)


class UNet(nn.Module):
    """Predicts the noise (Ho et al. 2020, eq. 11), x_0 or v from x_t, t and the class y.

    The encoder halves the resolution and widens the channels from level to level. The middle has two ResNet blocks
    around self-attention at the lowest resolution. Each level of the decoder reads the output of the level below it,
    concatenated with that of the encoder level of its own resolution (skip connection). The default arguments give
    levels of 32×32×32, 64×16×16, 128×8×8 and 256×4×4 (channels × height × width) and 2.3 million parameters.

    Args:
        image_size: height and width of the images, divisible by 2^(levels - 1).
        channels: 1 for grayscale, 3 for colour.
        dim: channels of the first level, a multiple of NORM_GROUPS.
        dim_mults: channels of each level, as multiples of `dim`.
        num_classes: number of classes; 0 for an unconditional model. y = num_classes, `no_class`, means no class.
        dropout: dropout probability in each ResNet block.
        encoder_attention: whether the encoder has self-attention, too; else only the decoder and the middle have it.
    """

    def __init__(
        self,
        image_size: int = 32,
        channels: int = 1,
        dim: int = 32,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        num_classes: int = 0,
        dropout: float = 0.0,
        encoder_attention: bool = True,
    ) -> None:
        super().__init__()
        self.image_size, self.channels, self.no_class = image_size, channels, num_classes
        widths, time_width = [dim * m for m in dim_mults], 4 * dim
        sizes = [image_size >> level for level in range(len(widths))]
        pairs = list(pairwise(widths))  # neighbouring levels: (upper, lower)

        self.time = TimeEmbedding(dim, time_width)
        self.label = nn.Embedding(num_classes + 1, time_width, padding_idx=self.no_class) if num_classes else None
        self.conv_in = nn.Conv2d(channels, dim, 3, padding=1)
        self.down = nn.ModuleList(
            ResnetBlock(c_in, c, time_width, size, dropout)
            for c_in, c, size in zip([dim, *widths[:-1]], widths, sizes, strict=True)
        )
        self.down_attention = nn.ModuleList(
            attention_at(size, c) if encoder_attention else nn.Identity()
            for c, size in zip(widths, sizes, strict=True)
        )
        self.downsample = nn.ModuleList(nn.Conv2d(upper, upper, 3, stride=2, padding=1) for upper, _ in pairs)
        self.middle_in = ResnetBlock(widths[-1], widths[-1], time_width, sizes[-1], dropout)
        self.middle_attention = Attention(widths[-1])
        self.middle_out = ResnetBlock(widths[-1], widths[-1], time_width, sizes[-1], dropout)
        self.up = nn.ModuleList(
            UpLevel(2 * c, c, time_width, size, dropout) for c, size in zip(widths, sizes, strict=True)
        )
        self.upsample = nn.ModuleList(nn.ConvTranspose2d(lower, upper, 2, stride=2) for upper, lower in pairs)
        self.norm_out = Norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)  # the first prediction is 0; for noise, that is the mean of the target
        if self.label is not None:
            nn.init.zeros_(self.label.weight)  # padding_idx keeps the row of no_class at 0

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict from images x_t (B,C,H,W), timesteps t in 0 ... T - 1 and classes y; (B,C,H,W).

        t and y are (B,), or (1,) if all images share them. y = None means no class.
        """
        emb = self.time(t)  # (B, D) or (1, D)
        if y is not None:
            assert self.label is not None, "an unconditional model has no classes"
            emb = emb + self.label(y)  # (B, D) or (1, D)
        h = self.conv_in(x_t)  # (B, dim, H, W)

        skips = []
        for block, attention, downsample in zip(self.down, self.down_attention, [*self.downsample, None], strict=True):
            h = attention(block(h, emb))  # (B, width, H, W)
            skips.append(h)
            if downsample is not None:
                h = downsample(h)  # (B, width, H/2, W/2)

        h = self.middle_out(self.middle_attention(self.middle_in(h, emb)), emb)  # (B, widest, H/8, W/8) for 4 levels

        for level, upsample in reversed(list(zip(self.up, [None, *self.upsample], strict=True))):
            h = level(torch.cat([h, skips.pop()], dim=1), emb)  # (B, width, H, W)
            if upsample is not None:
                h = upsample(h)  # (B, width above, 2H, 2W)

        return self.conv_out(F.silu(self.norm_out(h)))  # (B, C, H, W)
