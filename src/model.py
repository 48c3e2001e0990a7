"""The U-Net of DDPM (Ho et al. 2020, appendix B), cut down to about two million parameters.

Shapes at line ends: B images, C channels, H × W pixels, D the width of the time embedding.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

ATTENTION_RESOLUTIONS = (16, 8)  # maps of this height get self-attention, beside the middle (Ho et al.: 16)
LARGEST_SEPARABLE = 8  # from this height down, 3×3 convolutions are depthwise-separable
HEAD_WIDTH = 64  # channels of one attention head
NORM_GROUPS = 8  # groups of every GroupNorm; each width must be a multiple


class TimeEmbedding(nn.Module):
    """t → vector: sinusoids of geometrically spaced frequencies (Vaswani et al. 2017, §3.5), then two layers."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2) / (dim // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layers = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None].float() * self.frequencies  # (B, dim/2)
        return self.layers(torch.cat([angles.sin(), angles.cos()], dim=1))  # (B, D)


class Norm(nn.GroupNorm):
    """Group normalisation (Wu & He 2018) whose statistics are taken in float32, whatever the precision of x."""

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def conv3x3(c_in: int, c_out: int, resolution: int) -> nn.Module:
    """A 3×3 convolution: dense on large maps, depthwise-separable on small ones.

    A dense one costs 9·c_in·c_out weights whatever the map's size. At 8×8 and 4×4, where the U-Net is widest,
    those would be three quarters of the parameters, to serve 64 pixels or 16; separating space (3×3 a channel) from
    channels (1×1) keeps the widths at a ninth of the cost.
    """
    if resolution > LARGEST_SEPARABLE:
        return nn.Conv2d(c_in, c_out, 3, padding=1)
    return nn.Sequential(nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False), nn.Conv2d(c_in, c_out, 1))


class ResnetBlock(nn.Module):
    """x + two (3×3 convolution, GroupNorm, SiLU) layers; the time scales and shifts the first normalisation.

    The scale and shift are Dhariwal & Nichol 2021's adaptive group normalisation (§3, equation AdaGN). Norms come
    after the convolutions: before them, they would also run on the concatenated maps of the way up, twice as wide.
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
    """x + multi-head self-attention over the pixels of the map (Vaswani et al. 2017, §3.2).

    Written out: with at most 256 pixels there is little for a fused kernel to save, and torch's is slower on a CPU.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        most = max(1, channels // HEAD_WIDTH)
        self.heads = next(n for n in range(most, 0, -1) if channels % n == 0)  # heads of equal width
        self.norm = Norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        qkv = rearrange(self.qkv(self.norm(x)), "b (three n d) h w -> three b n (h w) d", three=3, n=self.heads)
        q, k, v = qkv  # (B, heads, H·W, C/heads) each
        weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)  # (B, heads, H·W, H·W): eq. 1
        return x + self.out(rearrange(weights @ v, "b n (h w) d -> b (n d) h w", h=height))  # (B, C, H, W)


def attention_at(resolution: int, channels: int) -> nn.Module:
    """Self-attention on the maps of ATTENTION_RESOLUTIONS, nothing on others."""
    return Attention(channels) if resolution in ATTENTION_RESOLUTIONS else nn.Identity()


class UpLevel(nn.Module):
    """One resolution on the way up: a ResNet block and, at 16×16 and 8×8, self-attention."""

    def __init__(self, c_in: int, c_out: int, time_width: int, resolution: int, dropout: float) -> None:
        super().__init__()
        self.block = ResnetBlock(c_in, c_out, time_width, resolution, dropout)
        self.attention = attention_at(resolution, c_out)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.attention(self.block(x, emb))  # (B, c_out, H, W)


class UNet(nn.Module):
    """The network of Ho et al. 2020, eq. 11: from x_t, t and the class y, a prediction of the noise (or of x_0 or v).

    Down through the levels, halving the map and widening the channels; a middle of two ResNet blocks around
    self-attention at the lowest resolution; up again, each level reading beside its input what the level of its
    resolution wrote on the way down. With the default arguments: levels of 32×32×32, 64×16×16, 128×8×8 and
    256×4×4, and 2.3 million parameters.

    Args:
        image_size: height and width of the images, divisible by 2^(levels - 1).
        channels: 1 for grayscale, 3 for colour.
        dim: channels of the first level, a multiple of NORM_GROUPS.
        dim_mults: channels of each level, as multiples of `dim`.
        num_classes: how many classes y may name; 0 for the plain model, which knows of none.
        dropout: dropout probability in each ResNet block.
        encoder_attention: self-attention on the way down, too; without it, only on the way up and in the middle.

    Attributes:
        no_class: the y that tells nothing, one above the classes.
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
        widths = [dim * m for m in dim_mults]
        sizes = [image_size >> level for level in range(len(widths))]
        time_width = 4 * dim
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
        nn.init.zeros_(self.conv_out.weight)  # the first prediction is 0, the mean of what is to be predicted
        nn.init.zeros_(self.conv_out.bias)
        if self.label is not None:
            nn.init.zeros_(self.label.weight)  # classes begin alike; the row of no_class, its padding, stays 0

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Images x_t (B,C,H,W), timesteps t from 0 to T - 1 and classes y → the prediction (B,C,H,W).

        t and y are (B,), or (1,), one for all; without y, the network is told no class.
        """
        emb = self.time(t)  # (B, D) or (1, D)
        if y is not None:
            emb = emb + self.label(y)  # (B, D) or (1, D)
        h = self.conv_in(x_t)  # (B, dim, H, W)

        skips = []
        for block, attention, downsample in zip(self.down, self.down_attention, [*self.downsample, None], strict=True):
            h = attention(block(h, emb))  # (B, width, H, W)
            skips.append(h)
            if downsample is not None:
                h = downsample(h)  # (B, width, H/2, W/2)

        h = self.middle_in(h, emb)
        h = self.middle_attention(h)
        h = self.middle_out(h, emb)  # (B, widest, H/8, W/8) with four levels

        for level, upsample in reversed(list(zip(self.up, [None, *self.upsample], strict=True))):
            h = level(torch.cat([h, skips.pop()], dim=1), emb)  # (B, width, H, W)
            if upsample is not None:
                h = upsample(h)  # (B, width above, 2H, 2W)

        return self.conv_out(F.silu(self.norm_out(h)))  # (B, C, H, W)
