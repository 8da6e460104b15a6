"""The groups of measures of a latent space: each a function from a subject to its figures by name."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..measurement.frechet import FeatureMoments, frechet_distance
from ..measurement.latent_space import (
    TRANSFORMS,
    Distance,
    Measure,
    PixelDistance,
    equivariance_error,
    exchange_code,
    high_frequency_share,
    jump_share,
    kernel_distance,
    level_noise,
    linear_probe,
    local_lipschitz,
    neighbour_consistency,
    neighbour_midpoints,
    participation_ratio,
    path_length,
    path_steps,
    project,
    replace_tokens,
    shift_stability,
    spectral_slope,
    straightness,
    unchanged_share,
)
from .diffusability import heldout_denoising_losses, train_small_diffusion
from .latent_subject import NotApplicable, Subject

Measures = dict[str, Measure]


def means(subject: Subject, values: dict[str, Tensor], **settings) -> Measures:
    """The means of several measures with the same settings."""
    return {name: subject.mean_measure(name, rows, **settings) for name, rows in values.items()}


def smoothness(subject: Subject) -> Measures:
    config, distance = subject.config, subject.perceptual
    start, end = subject.pairs()
    t = torch.rand(len(start), generator=subject.generator()).to(start.device)
    ways = {"": (subject.decode_centred, config.path_epsilon)}
    if subject.autoencoder.is_discrete:
        ways["_quantized"] = (subject.decode_centred_quantized, 1 / config.path_steps)
    found: Measures = {}
    for suffix, (decode, epsilon) in ways.items():

        def length(a: Tensor, b: Tensor, u: Tensor, decode=decode, epsilon=epsilon) -> Tensor:
            return path_length(decode, distance, a, b, u, epsilon)

        speeds = subject.batched(length, start, end, t * (1 - epsilon))
        found |= means(subject, {f"perceptual_path_length{suffix}": speeds}, epsilon=epsilon)
        lengths, chords = path_steps(decode, distance, start, end, config.path_steps)
        of_steps = {"path_straightness": straightness(lengths, chords), "path_jump_share": jump_share(lengths)}
        found |= means(subject, {name + suffix: rows for name, rows in of_steps.items()}, steps=config.path_steps)
    return found


def lipschitz(subject: Subject) -> Measures:
    config = subject.config

    def gain(latents: Tensor) -> Tensor:
        quantized = subject.autoencoder.quantize(latents)[0]
        return local_lipschitz(subject.autoencoder.decode, quantized, config.lipschitz_iterations, config.seed)

    gains = subject.batched(gain, subject.latents[: config.lipschitz_images]) * subject.std
    return means(subject, {"lipschitz": gains}, iterations=config.lipschitz_iterations)


def distances(subject: Subject, prefix: str, decoded: Tensor, **settings) -> Measures:
    """Distances of `decoded` images from the originals, `PREFIXfid` and `PREFIXkid`."""
    extractor = subject.extractor
    real, fake = (subject.batched(extractor.features, images) for images in (subject.pixels, decoded))
    dimension = min(real.shape[1], max(4, 2 ** int(math.log2(len(real) / 8))))

    def distance(a: Tensor, b: Tensor) -> float:
        moments = []
        for features in (a, b):
            moments.append(FeatureMoments(features.shape[1]))
            moments[-1].update(features)
        return max(0.0, frechet_distance(*moments))

    settings |= {"features": extractor.name, "upscale": extractor.upscale}
    projected = project(real, dimension), project(fake, dimension)
    return {
        f"{prefix}fid": subject.set_measure(f"{prefix}fid", distance, *projected, **settings, projections=dimension),
        f"{prefix}kid": subject.set_measure(f"{prefix}kid", kernel_distance, real, fake, **settings),
    }


def holes(subject: Subject) -> Measures:
    rebuilt = subject.batched(subject.decode_quantized, subject.latents)
    middle = subject.decode_centred_quantized(neighbour_midpoints(subject.centred))
    return distances(subject, "r", rebuilt) | distances(subject, "i", middle)


def robustness(subject: Subject) -> Measures:
    config, generator = subject.config, subject.generator()
    codes, share, neighbours = subject.codes, config.replaced_share, config.replaced_neighbours
    replaced = {"share": share, "neighbours": neighbours}
    perturbed = replace_tokens(codes, subject.codebooks(), share, neighbours, generator)
    before, after = subject.decode_indices(codes), subject.decode_indices(perturbed)
    found = means(subject, {"token_robustness": subject.batched(subject.perceptual, after, before)}, **replaced)
    found |= distances(subject, "p", after, **replaced)
    noisy = subject.batched(subject.encode_indices, level_noise(subject.pixels, generator))
    found |= means(subject, {"index_stability_noise": unchanged_share(codes, noisy)})
    factor = subject.autoencoder.downsample_factor
    for name, shift in (("pixel", 1), ("stride", factor)):
        if name == "pixel" and factor == 1:
            continue  # the same thing

        def stays(pixels: Tensor, shift=shift) -> Tensor:
            return shift_stability(subject.encode_indices, pixels, shift, factor)

        found |= means(subject, {f"index_stability_{name}_shift": subject.batched(stays, subject.pixels)})
    return found


def codes(subject: Subject) -> Measures:
    config, generator = subject.config, subject.generator()
    indices, (codebook, *_) = subject.codes, subject.codebooks()
    used = indices[..., 0].unique()
    if len(used) < 4:
        raise NotApplicable(f"only {len(used)} codes are used")
    ways: dict[str, Distance] = {"": subject.perceptual, "_pixels": PixelDistance()}
    correlations: dict[str, list[float]] = {suffix: [] for suffix in ways}
    for context in indices[: config.consistency_contexts].split(1):
        row, column = (int(torch.randint(side, (), generator=generator)) for side in context.shape[1:3])
        drawn = used[torch.randperm(len(used), generator=generator)[: config.consistency_codes].to(used.device)]
        images = subject.decode_indices(exchange_code(context, row, column, drawn))
        for suffix, distance in ways.items():
            correlations[suffix].append(neighbour_consistency(distance, images, codebook[drawn]))
    values = {f"code_neighbour_consistency{suffix}": torch.tensor(rows) for suffix, rows in correlations.items()}
    return means(subject, values, codes=config.consistency_codes)


def equivariance(subject: Subject) -> Measures:
    values: dict[str, Tensor] = {}
    side = subject.pixels.shape[2]
    for name, transform in TRANSFORMS.items():
        if name == "scale" and side % (2 * subject.autoencoder.downsample_factor):
            continue

        def error(pixels: Tensor, latents: Tensor, transform=transform) -> Tensor:
            return equivariance_error(subject.encode, pixels, latents, transform, subject.std)

        def image_error(pixels: Tensor, latents: Tensor, transform=transform) -> Tensor:
            return subject.perceptual(subject.decode_quantized(transform(latents)), transform(pixels))

        for suffix, function in (("", error), ("_reconstruction", image_error)):
            values[f"equivariance_{name}{suffix}"] = subject.batched(function, subject.pixels, subject.latents)
    rebuilt = subject.batched(subject.decode_quantized, subject.latents)
    values["reconstruction"] = subject.batched(subject.perceptual, rebuilt, subject.pixels)
    return means(subject, values)


def spectrum(subject: Subject) -> Measures:
    side = subject.latents.shape[2]
    if side < 8:
        raise NotApplicable(f"latents of {side}x{side} positions have no spectrum to speak of")
    shrunk = torch.nn.functional.interpolate(subject.pixels, (side, side), mode="area")
    values: dict[str, Tensor] = {}
    for name, maps in (("latent", subject.latents), ("image", shrunk)):
        values[f"{name}_high_frequency_share"] = high_frequency_share(maps)
        values[f"{name}_spectral_slope"] = spectral_slope(maps)
    return means(subject, values)


def probe(subject: Subject) -> Measures:
    labels = subject.images.labels
    if labels is None:
        raise NotApplicable("the dataset has no label column, or several: --label_column")
    kept = (labels.bincount() >= 5)[labels]
    labels = labels[kept].unique(return_inverse=True)[1]
    if not len(labels) or labels.max() == 0:
        raise NotApplicable("there are no two classes with five images each: more --max_samples")
    latents, seed = subject.centred[kept], subject.config.seed
    pooled = torch.cat([latents.mean(dim=(2, 3)), latents.std(dim=(2, 3))], dim=1)
    values = {
        "linear_probe": linear_probe(pooled, labels, seed=seed),
        "linear_probe_flattened": linear_probe(latents.flatten(1), labels, seed=seed),
        "linear_probe_chance": (labels == labels.bincount().argmax()).double(),
    }
    return means(subject, values, classes=int(labels.max()) + 1)


def dimension(subject: Subject) -> Measures:
    vectors = subject.centred.flatten(2).double()  # (N, D, hw)
    moments = vectors @ vectors.transpose(1, 2) / vectors.shape[2]

    def ratio(moments: Tensor, means: Tensor) -> float:
        mean = means.mean(dim=0)
        return participation_ratio(moments.mean(dim=0) - torch.outer(mean, mean))

    return {"effective_dimension": subject.set_measure("effective_dimension", ratio, moments, vectors.mean(dim=2))}


def diffusability(subject: Subject) -> Measures:
    if not subject.autoencoder.is_discrete:
        raise NotApplicable("only VQGANModels have a diffusion trainer here")
    config, levels, sampling_steps = subject.config, 8, 30
    channels = [64, 128] if subject.latents.shape[2] % 2 == 0 else [64]
    pipeline = train_small_diffusion(subject, channels)
    losses = heldout_denoising_losses(subject, pipeline, levels)
    generator, sizes = subject.generator(), [len(part) for part in subject.pixels.split(config.batch_size)]
    options = {"num_inference_steps": sampling_steps, "generator": generator, "output_type": "pt"}
    samples = torch.cat([pipeline(size, **options).images * 2 - 1 for size in sizes]).float()
    model = {"channels": channels, "train_steps": config.diffusion_steps}
    found = distances(subject, "g", samples, sampling_steps=sampling_steps, **model)
    split = config.diffusion_train_split
    return found | means(subject, {"diffusion_loss": losses}, levels=levels, train_split=split, **model)


GROUPS: dict[str, Callable[[Subject], Measures]] = {
    "smoothness": smoothness,
    "lipschitz": lipschitz,
    "holes": holes,
    "robustness": robustness,
    "codes": codes,
    "equivariance": equivariance,
    "spectrum": spectrum,
    "probe": probe,
    "dimension": dimension,
    "diffusability": diffusability,
}
SLOW = ("diffusability",)
