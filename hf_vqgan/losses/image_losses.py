"""The three losses on reconstructions and their gradients.

x is the image, x̂ its reconstruction, both in [-1, 1].

    L1            compares pixels: |x̂ - x|. Stable but blurry: for an unknown detail, the median colour is optimal.
    perceptual    compares features of a pretrained network (LPIPS), which need edges and textures.
    adversarial   a discriminator, trained alongside, detects what makes reconstructions look unreal.

Every loss is returned under its name, unweighted. Weights are applied once, by `weighted_sum`.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lpips_weights import NETWORKS, load_head_weights, load_trunk_weights


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """
    Σ weight * term. A term of weight 0 may be missing; otherwise it stays in the graph, since DDP waits for a gradient,
    even zero, of every parameter that took part in the forward pass.

    Raises:
        KeyError: if a term has a weight but was not computed, or was computed but has no weight.
    """
    if missing := [name for name, weight in weights.items() if weight and name not in terms]:
        raise KeyError(f"weighted but not computed: {missing}; computed: {sorted(terms)}.")
    if unknown := sorted(terms.keys() - weights.keys()):
        raise KeyError(f"computed but without a weight: {unknown}; give 0 to log a term without training on it.")
    return sum((weights[name] * term for name, term in terms.items()), start=torch.zeros(()))


class LPIPS(nn.Module):
    r"""
    Learned perceptual image patch similarity, v0.1 (https://huggingface.co/papers/1801.03924, eq. 1):

        d(x, y) = Σ_l mean_hw Σ_c w_lc (x̂_lchw - ŷ_lchw)²,

    x̂_l and ŷ_l being a pretrained network's features at layer l, normalised to unit length over channels. The
    learned w are the `lpips` package's; distances equal that package's, without its dropout (a model-wide `.train()`
    would turn it on). Frozen; always in eval mode.

    Args:
        net (`str`): `"vgg"` (what VQ-GANs are trained with) or `"alex"` (three times cheaper on CPU or more; what most
            tables report).
        weights_path (`str`, *optional*): The trunk's weights: a torchvision `.pth`, or safetensors with its keys.
        upscale (`int`, defaults to 1): Enlarge images by this factor first (bilinear), for small crops: the network was
            trained at 224 pixels.
    """

    def __init__(self, net: str = "vgg", weights_path: str | None = None, upscale: int = 1):
        super().__init__()
        self.net, self.upscale = net, upscale
        self.slices = NETWORKS[net].build()
        self.slices.load_state_dict(load_trunk_weights(net, weights_path), assign=True)
        self.heads = nn.ParameterList(load_head_weights(net))  # per layer: (1, C, 1, 1), non-negative
        # What ImageNet networks expect, moved from [0, 1] to [-1, 1] (the constants of the lpips package).
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(False)

    @property
    def min_side(self) -> int:
        """Smallest side of an image, in pixels, that the network accepts."""
        return -(-NETWORKS[self.net].min_side // self.upscale)

    def features(self, pixel_values: Tensor) -> list[Tensor]:
        """
        Unit-length features per layer of images `(B, 3, H, W)` in [-1, 1].

        Raises:
            ValueError: for images smaller than `min_side`.
        """
        if min(pixel_values.shape[2:]) < self.min_side:
            raise ValueError(
                f"images of {pixel_values.shape[2]}x{pixel_values.shape[3]} pixels are too small for LPIPS: "
                f"net={self.net!r} with upscale={self.upscale} needs sides of {self.min_side} pixels or more."
            )
        if self.upscale != 1:
            pixel_values = F.interpolate(pixel_values, scale_factor=float(self.upscale), mode="bilinear")
        hidden = (pixel_values - self.shift) / self.scale
        features = []
        for layers in self.slices:
            hidden = layers(hidden)
            precision = torch.promote_types(hidden.dtype, torch.float32)
            norm = torch.linalg.vector_norm(hidden, dim=1, keepdim=True, dtype=precision)
            features.append(hidden / (norm + 1e-10))
        return features

    def distance(self, features: list[Tensor], other: list[Tensor]) -> Tensor:
        """Distance per image, `(B,)`, from two results of `features`."""
        layers = zip(features, other, self.heads, strict=True)
        return sum(((a - b).square() * head).sum(dim=1).mean(dim=(1, 2)) for a, b, head in layers)

    def forward(self, sample: Tensor, target: Tensor) -> Tensor:
        """`(B, 3, H, W)` twice, in [-1, 1], to `(B,)`. No gradient reaches `target`."""
        with torch.no_grad():
            target_features = self.features(target)
        return self.distance(self.features(sample), target_features)


def reconstruction_losses(sample: Tensor, target: Tensor, perceptual: LPIPS | None) -> dict[str, Tensor]:
    """Unweighted `l1`, `l2` and, given a network, `perceptual`: means over batch and pixels."""
    terms = {"l1": F.l1_loss(sample, target), "l2": F.mse_loss(sample, target)}
    if perceptual is not None:
        terms["perceptual"] = perceptual(sample, target).mean()
    return terms


ADVERSARIAL_LOSSES = ("hinge", "non_saturating")


def adversarial_loss(fake_logits: Tensor, kind: str) -> Tensor:
    """
    Loss of the generator: `hinge`: -mean(D(x̂)) (https://huggingface.co/papers/1705.02894); `non_saturating`:
    mean(softplus(-D(x̂))) (https://huggingface.co/papers/1406.2661, section 3).
    """
    return -fake_logits.mean() if kind == "hinge" else F.softplus(-fake_logits).mean()


def discriminator_losses(real_logits: Tensor, fake_logits: Tensor, kind: str) -> dict[str, Tensor]:
    """
    Losses of the discriminator, to be summed with weight ½ each: `hinge`: relu(1 - D(x)), relu(1 + D(x̂));
    `non_saturating`: softplus(-D(x)), softplus(D(x̂)).
    """
    if kind == "hinge":
        return {"disc_real": F.relu(1 - real_logits).mean(), "disc_fake": F.relu(1 + fake_logits).mean()}
    return {"disc_real": F.softplus(-real_logits).mean(), "disc_fake": F.softplus(fake_logits).mean()}


def lecam_penalty(real_logits: Tensor, fake_logits: Tensor, anchor_real: float, anchor_fake: float) -> Tensor:
    """
    mean relu(D(x) - a_fake)² + mean relu(a_real - D(x̂))², where the a are moving averages of the logits: it keeps real
    and fake logits close, for small datasets (LeCAM, https://huggingface.co/papers/2104.03310, eq. 3, in the
    one-sided form of its code).
    """
    return F.relu(real_logits - anchor_fake).square().mean() + F.relu(anchor_real - fake_logits).square().mean()


def r1_penalty(real_logits: Tensor, real: Tensor) -> Tensor:
    """
    E |∂D(x)/∂x|², where D(x) is the sum of an image's logits: without a gradient at the data, training can converge
    (https://huggingface.co/papers/1801.04406, eq. 9). `real` `(B, C, H, W)` has to require a gradient.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def last_layer_gradient(sample: Tensor, last_layer: Tensor, gradient: Tensor) -> Tensor:
    """
    ∂L/∂W of the decoder's last convolution, from `gradient` = ∂L/∂x̂ alone.

    x̂ is that convolution's output, so autograd computes this one product and nothing else of the network.
    """
    return torch.autograd.grad(sample, last_layer, gradient, retain_graph=True)[0]


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor, maximum: float) -> Tensor:
    """
    λ = |∇_W L_rec| / (|∇_W L_adv| + 1e-4), at most `maximum`, where W is the decoder's last layer (VQ-GAN,
    https://huggingface.co/papers/2012.09841, eq. 7; taming-transformers' ε and cap): the adversarial gradient
    becomes as strong as the reconstruction's, whatever the scale of the logits.

    Without an adversarial gradient there is nothing to balance: λ = 0, not the cap.
    """
    norm = adversarial_gradient.norm()
    return torch.where(norm > 0, reconstruction_gradient.norm() / (norm + 1e-4), 0.0).clamp(max=maximum)


def ramp(step: int, start: int, length: int) -> float:
    """0 before `start`, then linearly to 1 over `length` steps (at once if 0)."""
    if step < start:
        return 0.0
    return 1.0 if length == 0 else min(1.0, (step - start) / length)
