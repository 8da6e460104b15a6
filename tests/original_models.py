"""Small stand-ins for the original tokenizers, written from their layout's rules and named as their files are.

They share no code with the package: what the importer must get right (order of levels, placement of attention, choice
of codes, ranges) is stated here a second time.
"""

import torch
import torch.nn.functional as F
from torch import nn


class SpatialNorm(nn.Module):
    def __init__(self, channels, code_dim):
        super().__init__()
        self.norm_layer = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv_y = nn.Conv2d(code_dim, channels, 1)
        self.conv_b = nn.Conv2d(code_dim, channels, 1)

    def forward(self, x, codes):
        codes = F.interpolate(codes, size=x.shape[2:], mode="nearest")
        return self.norm_layer(x) * self.conv_y(codes) + self.conv_b(codes)


class PlainNorm(nn.GroupNorm):
    def __init__(self, channels):
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x, codes):
        return super().forward(x)


def make_norm(channels, code_dim):
    return SpatialNorm(channels, code_dim) if code_dim else PlainNorm(channels)


class ResBlock(nn.Module):
    def __init__(self, before, after, code_dim=None):
        super().__init__()
        self.norm1 = make_norm(before, code_dim)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = make_norm(after, code_dim)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x, codes=None):
        h = self.conv1(F.silu(self.norm1(x, codes)))
        h = self.conv2(F.silu(self.norm2(h, codes)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class MaskGitResBlock(nn.Module):
    def __init__(self, before, after, code_dim=None):
        super().__init__()
        self.norm1 = PlainNorm(before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm2 = PlainNorm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        if before != after:
            self.nin_shortcut = nn.Conv2d(after, after, 1, bias=False)

    def forward(self, x, codes=None):
        h = self.conv1(F.silu(self.norm1(x, None)))
        h = self.conv2(F.silu(self.norm2(h, None)))
        return h + (self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    def __init__(self, channels, code_dim=None, linear=False):
        super().__init__()
        self.norm = make_norm(channels, code_dim)
        layers = (nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1) for _ in range(4))
        self.q, self.k, self.v, self.proj_out = layers

    def forward(self, x, codes=None):
        h = self.norm(x, codes)
        q, k, v = (self.project(part, h).flatten(2) for part in (self.q, self.k, self.v))
        weights = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, dim=2)
        return x + self.project(self.proj_out, (v @ weights.transpose(1, 2)).view_as(x))

    @staticmethod
    def project(part, x):
        return part(x.movedim(1, -1)).movedim(-1, 1) if isinstance(part, nn.Linear) else part(x)


class Resample(nn.Module):
    def __init__(self, channels, down):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0))


class Level(nn.Module):
    def __init__(self, family, before, after, layers, attention, code_dim, resample, never_run):
        super().__init__()
        self.blocks, self.attns, self.resample, self.never_run = family.blocks, family.attns, resample, never_run
        block = MaskGitResBlock if family.maskgit else ResBlock
        blocks = [block(after if layer else before, after, code_dim) for layer in range(layers)]
        setattr(self, self.blocks, nn.ModuleList(blocks))
        if attention:
            linear = family.linear_attention
            setattr(self, self.attns, nn.ModuleList(AttnBlock(after, code_dim, linear) for _ in range(layers)))
        if resample == "downsample" and not family.maskgit:
            self.downsample = Resample(after, True)
        elif resample == "upsample":
            if family.maskgit:
                self.upsample_conv = nn.Conv2d(after, after, 3, padding=1)
            else:
                self.upsample = Resample(after, False)

    def forward(self, x, codes=None):
        attns = getattr(self, self.attns, None)
        for number, block in enumerate(getattr(self, self.blocks)):
            x = block(x, codes)
            if attns is not None and not self.never_run:
                x = attns[number](x, codes)
        if hasattr(self, "downsample"):
            return self.downsample(x)
        if hasattr(self, "upsample"):
            return self.upsample(x)
        if hasattr(self, "upsample_conv"):
            return self.upsample_conv(F.interpolate(x, scale_factor=2.0))
        return F.avg_pool2d(x, 2) if self.resample == "downsample" else x


class Half(nn.Module):
    """Encoder or decoder."""

    def __init__(self, family, down, inputs, outputs, code_dim):
        super().__init__()
        self.down, self.maskgit, self.levels = down, family.maskgit, family.levels[0 if down else 1]
        channels = [family.ch * factor for factor in family.mult]
        order = list(range(len(channels))) if down else list(range(len(channels)))[::-1]  # as run
        block = MaskGitResBlock if family.maskgit else ResBlock
        first = family.ch if down else channels[-1]
        self.conv_in = nn.Conv2d(inputs, first, 3, padding=1, bias=not (family.maskgit and down))
        before, levels = first, []
        layers = family.layers + (not down and not family.maskgit)
        for place, level in enumerate(order):
            resample = None if place == len(order) - 1 else ("downsample" if down else "upsample")
            never_run = family.never_runs_single and layers == 1
            levels.append(
                Level(family, before, channels[level], layers, level in family.attention, code_dim, resample, never_run)
            )
            before = channels[level]
        self.stored_as_run = down or family.lowest_first
        setattr(self, self.levels, nn.ModuleList(levels if self.stored_as_run else levels[::-1]))
        last = channels[-1]
        middle = [block(last, last, code_dim)]
        if family.maskgit:
            middle += [block(last, last) for _ in range(family.layers - 1)]
            self.mid = nn.ModuleList(middle)
        else:
            middle += [AttnBlock(last, code_dim, family.linear_attention)] if family.mid_attention else []
            middle += [block(last, last, code_dim)]
            names = family.middle if family.mid_attention else (family.middle[0], family.middle[2])
            self.mid = nn.ModuleDict(dict(zip(names, middle, strict=True)))
        end = last if down else channels[0]
        self.norm_out = make_norm(end, code_dim)
        kernel = 1 if family.maskgit and down else 3
        self.conv_out = nn.Conv2d(end, outputs, kernel, padding=kernel // 2)

    def forward(self, x, codes=None):
        levels = list(getattr(self, self.levels))
        levels = levels if self.stored_as_run else levels[::-1]
        middle = list(self.mid if self.maskgit else self.mid.values())
        x = self.conv_in(x)
        for part in levels + middle if self.down else middle + levels:
            x = part(x, codes)
        return self.conv_out(F.silu(self.norm_out(x, codes)))


class Original(nn.Module):
    """
    A tokenizer with the names and the behaviour of one original project.

    `choice`: "nearest", "sphere" (unit latents and codes), "product" (largest dot product) or "gumbel" (largest logit).
    """

    blocks, attns, levels, middle = "block", "attn", ("down", "up"), ("block_1", "attn_1", "block_2")

    def __init__(
        self, *, ch=32, mult=(1, 2, 2), layers=1, attention=(2,), mid_attention=True, z=6, dim=4, codes=24,
        choice="nearest", lowest_first=False, maskgit=False, spatial=False, decoder=True, never_runs_single=False,
        normalizes_lookup=False, channels=3, linear_attention=False,
    ):  # fmt: skip
        super().__init__()
        self.ch, self.mult, self.layers, self.attention, self.mid_attention = ch, mult, layers, attention, mid_attention
        self.linear_attention = linear_attention
        self.lowest_first, self.maskgit, self.choice = lowest_first, maskgit, choice
        self.never_runs_single, self.normalizes_lookup, self.spatial = never_runs_single, normalizes_lookup, spatial
        self.encoder = Half(self, True, channels, z, None)
        if decoder:
            self.decoder = Half(self, False, z, channels, dim if spatial else None)
        if not maskgit:
            self.quant_conv = nn.Conv2d(z, dim, 1)
            self.post_quant_conv = nn.Conv2d(dim, z, 1)
        self.quantize = nn.Module()
        name = "embed" if choice == "gumbel" else "embedding"
        self.quantize.add_module(name, nn.Embedding(codes, dim))
        if choice == "gumbel":
            self.quantize.proj = nn.Conv2d(dim, codes, 1)
        with torch.no_grad():
            for parameter in self.parameters():  # norms and biases too, so that no tensor can be mistaken for another
                parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else 1))
                if parameter.ndim == 4:
                    parameter.mul_(parameter[0].numel() ** -0.5)
            # Latents around zero, and codes among them but of various lengths: then many codes are in use, and each
            # rule of choice prefers others.
            z = self.latents(torch.rand(4, channels, 32, 32) * 2 - 1)
            (self.encoder.conv_out if maskgit else self.quant_conv).bias -= z.mean(dim=(0, 2, 3))
            z = (z - z.mean(dim=(0, 2, 3), keepdim=True)).transpose(0, 1).flatten(1).T
            book = getattr(self.quantize, name).weight
            book.copy_(z[torch.randint(len(z), (codes,))] * (0.5 + torch.rand(codes, 1)))
        self.eval()

    def latents(self, x):
        return self.encoder(x) if self.maskgit else self.quant_conv(self.encoder(x))

    @torch.no_grad()
    def run(self, x):
        """Images in the original's own range to latents, indices, quantized, reconstruction, decode_from_indices."""
        z = self.latents(x)
        book = (self.quantize.embed if self.choice == "gumbel" else self.quantize.embedding).weight
        vectors = z.permute(0, 2, 3, 1).flatten(0, 2)
        if self.choice == "sphere":
            vectors, book = F.normalize(vectors, dim=1), F.normalize(book, dim=1)
        scores = {
            "nearest": lambda: -(vectors[:, None] - book[None]).double().square().sum(2),
            "sphere": lambda: -(vectors[:, None] - book[None]).double().square().sum(2),
            "product": lambda: vectors @ book.T,
            "gumbel": lambda: vectors @ self.quantize.proj.weight.flatten(1).T + self.quantize.proj.bias,
        }[self.choice]()
        indices = scores.argmax(1).view(z.shape[0], *z.shape[2:])
        result = {"latents": z, "indices": indices, "quantized": book[indices].permute(0, 3, 1, 2)}
        if hasattr(self, "decoder"):
            looked_up = F.normalize(book, dim=1) if self.normalizes_lookup else book
            for name, codes in (("reconstruction", book), ("decode_from_indices", looked_up)):
                quantized = codes[indices].permute(0, 3, 1, 2)
                inner = quantized if self.maskgit else self.post_quant_conv(quantized)
                result[name] = self.decoder(inner, quantized if self.spatial else None)
        return result


class OriginalLlamaGen(Original):
    blocks, attns, levels, middle = "res", "attn", ("conv_blocks", "conv_blocks"), ("0", "1", "2")
