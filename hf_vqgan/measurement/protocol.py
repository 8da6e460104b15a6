"""How reconstructions were measured: fields in files, of which cards and tables make sentences."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """
    What figures have to share to be compared.

    Args:
        dataset (`str`): As others may know it.
        split (`str`, *optional*): `None` where it is not known, as of a stream.
        num_images (`int`): Readable images.
        resolution (`int`, *optional*): Side of the square that is cut out.
        resize (`int`): Shorter side before cropping; 0: as the image is, if it is large enough.
        crop (`str`): `"center"`, or `"none"` for whole images, cut to multiples of f.
        lpips_net (`str`, *optional*): Network of `lpips`.
        pixel_range (`tuple[float, float]`): Of the pixels that PSNR and SSIM are taken on.
        codebook_steps, codebook_positions (`int`, *optional*): Training steps over which perplexity and usage were
            counted, and the latent positions in them; `None`: over the images themselves.
        latent_images (`int`, *optional*): Training crops that scaling_factor and shift_factor were measured on.
    """

    dataset: str
    split: str | None
    num_images: int
    resolution: int | None = None
    resize: int = 0
    crop: str = "center"
    lpips_net: str | None = None
    pixel_range: tuple[float, float] = (0.0, 1.0)
    codebook_steps: int | None = None
    codebook_positions: int | None = None
    latent_images: int | None = None

    @classmethod
    def from_dict(cls, content: dict) -> "Protocol":
        """What `as_dict` gave; keys that are not fields are passed over."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in names})

    def as_dict(self) -> dict:
        """For a JSON file: field by field."""
        return dataclasses.asdict(self) | {"pixel_range": list(self.pixel_range)}  # as JSON has it

    def describe_images(self) -> str:
        """Which images, and how they were cut."""
        split = f", split {self.split}" if self.split else ""
        return f"{self.num_images} image(s) of {self.dataset}{split} ({self.describe_cut()})"

    def describe_cut(self) -> str:
        size = f"shorter side to {self.resize} pixels" if self.resize else "at their own size"
        return f"{size}, {'whole' if self.crop == 'none' else f'the central {self.resolution}x{self.resolution}'}"

    def describe(self) -> str:
        """What PSNR, SSIM, LPIPS and l1 were measured on."""
        low, high = self.pixel_range
        lpips = f"; LPIPS v0.1 {self.lpips_net}" if self.lpips_net else ""
        return f"{self.describe_images()}, pixels clamped and mapped to [{low:g}, {high:g}], mean over images{lpips}"

    def describe_codes(self) -> str:
        """What perplexity and usage were measured on."""
        if self.codebook_steps is None:
            return f"all codes of {self.describe_images()}"
        return (
            f"codes of the training crops of the last {self.codebook_steps} steps ({self.codebook_positions:,} "
            "positions); usage is the share of codes hit at least once"
        )
