"""Sampling images from a diffusion model of a VQ-GAN's latents."""

import inspect

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, UNet2DModel, VQModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .modeling_vqgan import VQGANModel

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def normalize_latents(vqvae: VQGANModel | VQModel, latents: Tensor) -> Tensor:
    """Latents from `encode`, scaled for a diffusion model: about zero mean and unit variance."""
    return (latents - getattr(vqvae.config, "shift_factor", 0.0)) * vqvae.config.scaling_factor


def denormalize_latents(vqvae: VQGANModel | VQModel, latents: Tensor) -> Tensor:
    """The inverse of `normalize_latents`. A stock VQModel has no `shift_factor`: none is applied then."""
    return latents / vqvae.config.scaling_factor + getattr(vqvae.config, "shift_factor", 0.0)


def count_classes(denoiser: UNet2DModel | DiTTransformer2DModel) -> int:
    """
    Number of classes that the denoiser knows; 0 if it is unconditional.

    Its last class embedding means "no class". A DiT adds it by itself; a UNet does not, so its `num_class_embeds` is
    the number of classes plus one.
    """
    if isinstance(denoiser, DiTTransformer2DModel):
        return denoiser.config.num_embeds_ada_norm
    return max((denoiser.config.num_class_embeds or 0) - 1, 0)


def class_numbers(class_labels: int | str | list[int | str] | Tensor, classes: int, id2label: dict | None) -> list[int]:
    """
    The numbers of classes given by number or name.

    Raises:
        ValueError: for a number that is not in [0, `classes`), or a name that is not in `id2label`.
    """
    if isinstance(class_labels, (int, str)):
        class_labels = [class_labels]
    numbers_of = {name: int(number) for number, name in (id2label or {}).items()}
    numbers = [numbers_of.get(label, -1) if isinstance(label, str) else int(label) for label in class_labels]
    unknown = [label for label, number in zip(class_labels, numbers, strict=True) if not 0 <= number < classes]
    if unknown:
        names = f", or their names in pipeline.config.id2label ({len(numbers_of)} of them)" if numbers_of else ""
        raise ValueError(f"class_labels {unknown}: expected indices from 0 to {classes - 1}{names}.")
    return numbers


def predict(
    denoiser: UNet2DModel | DiTTransformer2DModel, latents: Tensor, timesteps: Tensor, class_labels: Tensor | None
) -> Tensor:
    """
    The denoiser's prediction for noisy `latents` `(B, D, h, w)`, in their dtype.

    A DiT that also predicts the noise's variance has twice the channels: the second half is dropped, as in diffusers'
    own pipelines, because the schedulers do not use it.

    Args:
        timesteps (`Tensor` of shape `(B,)`): Integer or, for flow matching, float in [0, 1000].
        class_labels (`Tensor` of shape `(B,)`, *optional*): `count_classes(denoiser)` means no class.
    """
    timesteps = timesteps.to(latents.device)
    condition = {} if class_labels is None else {"class_labels": class_labels}
    dtype = get_parameter_dtype(denoiser)  # the trainer's denoiser may be wrapped for DDP, and has no `dtype` then
    output = denoiser(latents.to(dtype), timestep=timesteps, **condition).sample
    return output[:, : latents.shape[1]].to(latents.dtype)


class VQGANLatentDiffusionPipeline(DiffusionPipeline):
    r"""
    Unconditional or class-conditional sampling in the latent space of a VQ-GAN, with any diffusers scheduler.

    Latents and the scheduler's arithmetic stay in float32, whatever the dtype of the networks, so that a seed gives the
    same noise in float32 and bfloat16.

    Args:
        vqvae ([`VQGANModel`] or `diffusers.VQModel`): Decodes the latents, which it quantizes first.
        denoiser (`UNet2DModel` or `DiTTransformer2DModel`):
            Predicts noise, velocity or flow, as the scheduler expects. Its last class embedding means "no class".
        scheduler: Any diffusers scheduler, flow matching included.
        id2label (`dict`, *optional*): Names of the classes, accepted in place of their indices.

    Example:
    ```python
    import hf_vqgan  # makes the pipeline known to diffusers
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained("runs/diffusion")
    images = pipeline(class_labels=[3, 3, 7], guidance_scale=2.0, num_inference_steps=30).images
    ```
    """

    model_cpu_offload_seq = "denoiser->vqvae"

    def __init__(
        self,
        vqvae: VQGANModel | VQModel,
        denoiser: UNet2DModel | DiTTransformer2DModel,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
    ):
        super().__init__()
        self.register_modules(vqvae=vqvae, denoiser=denoiser, scheduler=scheduler)
        # JSON has no integer keys, and a loaded pipeline has to equal the saved one.
        id2label = {str(index): name for index, name in id2label.items()} if id2label else None
        self.register_to_config(id2label=id2label)
        self.image_processor = VaeImageProcessor(vae_scale_factor=2 ** (len(vqvae.config.block_out_channels) - 1))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: int | str | list[int | str] | Tensor | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """
        Args:
            batch_size (`int`): How many images; with `class_labels`, how many per label.
            class_labels (*optional*): One or more class indices, or names from `id2label`. `None`: no class.
            guidance_scale (`float`):
                w of classifier-free guidance (https://huggingface.co/papers/2207.12598), which extrapolates (w > 1)
                from the prediction without class to the one with it. 1 means no guidance, at half the cost.
            num_inference_steps (`int`): Steps of the scheduler.
            eta (`float`): η of DDIM; schedulers without it ignore it.
            generator (`torch.Generator` or one per image, *optional*): Source of all noise.
            latents (`Tensor` of shape `(B, D, h, w)`, *optional*): Standard normal noise to start from.
            output_type (`str`):
                `"pil"`; `"np"`, `(B, H, W, 3)` in [0, 1]; `"pt"`, `(B, 3, H, W)` in [0, 1]; `"latent"`, `(B, D, h, w)`
                as `vqvae.encode` gives them, ready for `vqvae.decode`.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple if not `return_dict`.

        Raises:
            ValueError: for classes the denoiser does not know, and an unknown `output_type`.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} must be one of {', '.join(map(repr, OUTPUT_TYPES))}.")
        device, config = self._execution_device, self.denoiser.config
        labels, no_class = self._class_indices(class_labels, batch_size, guidance_scale)
        count = batch_size if labels is None else len(labels)
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: expected {shape}.")

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {"eta": eta, "generator": generator}
        options = {name: value for name, value in options.items() if name in accepted}
        scale_input = getattr(self.scheduler, "scale_model_input", lambda sample, timestep: sample)
        # Flow matching has no `init_noise_sigma`: it starts from unit noise.
        latents = latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        guided = labels is not None and guidance_scale != 1
        both = torch.cat([labels, torch.full_like(labels, no_class)]) if guided else labels
        for timestep in self.progress_bar(self.scheduler.timesteps):
            seen = scale_input(latents, timestep)
            seen = torch.cat([seen, seen]) if guided else seen
            predicted = predict(self.denoiser, seen, timestep.expand(len(seen)), both)
            if guided:
                with_class, without = predicted.chunk(2)
                predicted = without + guidance_scale * (with_class - without)
            latents = self.scheduler.step(predicted, timestep, latents, **options).prev_sample

        images = denormalize_latents(self.vqvae, latents)
        if output_type != "latent":
            images = self.vqvae.decode(images.to(self.vqvae.dtype)).sample
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _class_indices(
        self, class_labels: int | str | list[int | str] | Tensor | None, batch_size: int, guidance_scale: float
    ) -> tuple[Tensor | None, int]:
        """Class indices `(B,)` for the denoiser, `None` if it takes none, and the index that means no class."""
        classes = count_classes(self.denoiser)
        if class_labels is None:
            if guidance_scale != 1:
                raise ValueError(f"guidance_scale={guidance_scale} needs class_labels to guide towards.")
            if not classes:
                return None, 0
            return torch.full((batch_size,), classes, device=self._execution_device), classes
        if not classes:
            raise ValueError("class_labels are given, but the pipeline's denoiser is unconditional.")
        numbers = class_numbers(class_labels, classes, self.config.id2label)
        labels = torch.tensor(numbers, device=self._execution_device)
        return labels.repeat_interleave(batch_size), classes
