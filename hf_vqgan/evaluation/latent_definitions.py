"""Every measure of a latent space: its unit, which way is better, and what was done, in words."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Definition:
    """
    Args:
        unit (`str`): What the measure is counted in.
        better (`str`, *optional*): `"higher"` or `"lower"`; `None` where neither is better by itself.
        text (`str`): What was done; `{...}` are settings that a measure's protocol holds.
    """

    unit: str
    better: str | None
    text: str


PATH = "slerp of centred latents of image pairs, "
SHRUNK = "images shrunk to the latents"
REPLACED = "{share:.0%} of the tokens, each by one of its {neighbours} nearest codes"
SMALL_MODEL = "UNet of {channels} channels, {train_steps} steps of 32 latents, flow matching"
PROBE = "logistic regression, 5 folds, {classes} classes with 5 images or more, features: "
CODE_PAIRS = "pairs of {codes} used codes at one position of an image, distance in the codebook and "
MOVES = {"scale": "half size", "flip": "mirrored", "rotation": "turned by 90°"}

# Sets of images whose distance from the originals is taken: `rfid` and `rkid`, ...
SETS = {
    "r": "reconstructions",
    "i": "nearest-neighbour latents of the set, centred, slerp at ½, quantized where the model has codes, decoded",
    "p": f"replaced {REPLACED}",
    "g": f"samples in {{sampling_steps}} Euler steps; {SMALL_MODEL}",
}

SINGLE = {
    "lipschitz": Definition(
        "pixel L2 / latent std", "lower",
        "largest singular value of the decoder's Jacobian (L2 norms) at what images are decoded from, {iterations} "
        "power iterations, times the latents' standard deviation",
    ),
    "token_robustness": Definition("LPIPS", "lower", f"{REPLACED}, against before"),
    "index_stability_noise": Definition(
        "share of codes", "higher", "every channel of every pixel ±1/255 at random"
    ),
    "index_stability_pixel_shift": Definition(
        "share of codes", "higher", "crops moved by one pixel, right and down"
    ),
    "index_stability_stride_shift": Definition(
        "share of codes", "higher", "crops moved by f pixels, codes shifted back, right and down"
    ),
    "code_neighbour_consistency": Definition("Spearman's ρ", "higher", CODE_PAIRS + "LPIPS of the images"),
    "code_neighbour_consistency_pixels": Definition(
        "Spearman's ρ", "higher", CODE_PAIRS + "squared pixel difference of the images"
    ),
    "reconstruction": Definition(
        "LPIPS", "lower", "D(E(x)), x: what the equivariance of reconstructions is to be read against"
    ),
    "latent_high_frequency_share": Definition("share of energy", "lower", "latents, |f| > ¼"),
    "latent_spectral_slope": Definition("log power / log |f|", "lower", "latents, rings"),
    "image_high_frequency_share": Definition("share of energy", None, f"{SHRUNK}, |f| > ¼"),
    "image_spectral_slope": Definition("log power / log |f|", None, f"{SHRUNK}, rings"),
    "linear_probe": Definition("accuracy", "higher", PROBE + "mean and standard deviation over positions"),
    "linear_probe_flattened": Definition("accuracy", "higher", PROBE + "all positions"),
    "linear_probe_chance": Definition("accuracy", None, "always the most frequent class"),
    "effective_dimension": Definition(
        "dimensions", "higher", "participation ratio of the channels' covariance over images and positions"
    ),
    "diffusion_loss": Definition(
        "mean squared error", "lower",
        f"{{levels}} noise levels, images of the analysis; {SMALL_MODEL} on the split {{train_split!r}}",
    ),
}  # fmt: skip
PATHS = {
    f"{name}{suffix}": Definition(unit, better, f"{PATH}{latents}, {text}")
    for suffix, latents in {"": "continuous latents", "_quantized": "quantized on the way"}.items()
    for name, unit, better, text in (
        ("perceptual_path_length", "LPIPS / ε²", "lower", "one t per pair, ε = {epsilon:g}"),
        ("path_straightness", "chord / path length", "higher", "{steps} steps, √LPIPS"),
        ("path_jump_share", "share of steps", "lower", "{steps} steps, √LPIPS, longer than 3 mean steps"),
    )
}
DISTANCES = {
    f"{prefix}{name}": Definition(
        unit, "lower", f"{images}; features: {{features}}, images enlarged x{{upscale}}; {text}"
    )
    for prefix, images in SETS.items()
    for name, unit, text in (
        ("fid", "Fréchet distance", "{projections} random projections"),
        ("kid", "MMD²", "unbiased, cubic kernel"),
    )
}
EQUIVARIANCE = {
    f"equivariance_{name}{suffix}": Definition(unit, "lower", f"{error}, T: {move}")
    for name, move in MOVES.items()
    for suffix, unit, error in (("", "latent std", "E(Tx) - T E(x)"), ("_reconstruction", "LPIPS", "D(T E(x)), Tx"))
}
DEFINITIONS = SINGLE | PATHS | DISTANCES | EQUIVARIANCE


def define(name: str, settings: dict) -> dict:
    """The fields of a `Measure` that are not measured; its protocol is its id and `settings`."""
    definition = DEFINITIONS[name]
    return {"unit": definition.unit, "better": definition.better, "protocol": {"id": name} | settings}


def describe_protocol(protocol: dict) -> str:
    """A measure's protocol in words."""
    return DEFINITIONS[protocol["id"]].text.format(**protocol)
