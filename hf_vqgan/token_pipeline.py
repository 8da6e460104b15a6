"""TokenSampling images from a model of a VQ-GAN's tokens."""

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from .modeling_token_model import AutoregressiveTokenModel, MaskedTokenModel, TokenSampling
from .modeling_vqgan import VQGANModel
from .pipelines import class_numbers

OUTPUT_TYPES = ("pil", "np", "pt", "indices")


class VQGANTokenPipeline(DiffusionPipeline):
    r"""
    Unconditional or class-conditional images from a model of a VQ-GAN's tokens, autoregressive or masked.

    Tokens are drawn from logits in float32; the networks may be in any dtype.

    Args:
        vqvae ([`VQGANModel`]): Decodes the tokens.
        token_model ([`AutoregressiveTokenModel`] or [`MaskedTokenModel`]): Draws them.
        id2label (`dict`, *optional*): Names of the classes, which may then be given instead of numbers.

    Raises:
        ValueError: for a model of other tokens than the VQ-GAN has.

    Example:
    ```python
    import hf_vqgan  # makes the pipeline known to diffusers
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained("runs/tokens")
    images = pipeline(class_labels=[3, 3, 7], guidance_scale=2.0, top_k=500).images
    ```
    """

    model_cpu_offload_seq = "token_model->vqvae"

    def __init__(
        self,
        vqvae: VQGANModel,
        token_model: AutoregressiveTokenModel | MaskedTokenModel,
        id2label: dict | None = None,
    ):
        super().__init__()
        check_vocabulary(vqvae, token_model)
        self.register_modules(vqvae=vqvae, token_model=token_model)
        # JSON has no integer keys: a loaded pipeline has to equal the one saved.
        id2label = {str(number): name for number, name in id2label.items()} if id2label else None
        self.register_to_config(id2label=id2label)
        self.image_processor = VaeImageProcessor(vae_scale_factor=vqvae.config.downsample_factor)

    @torch.no_grad()
    def __call__(
        self,
        num_images: int = 1,
        class_labels: int | str | list[int | str] | Tensor | None = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        num_inference_steps: int | None = None,
        choice_temperature: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """
        Args:
            num_images (`int`): How many images; with `class_labels`, how many per label.
            class_labels (*optional*): One or more class numbers, or names from `id2label`. `None`: no class.
            guidance_scale (`float`):
                w of classifier-free guidance: away from the prediction without class, towards and past (w > 1) the one
                with it. 1 means no guidance, at half the work.
            temperature (`float`): Divides the logits; 0 takes the likeliest token.
            top_k (`int`): Draw each token from the k likeliest; 0 for all.
            top_p (`float`): Draw each token from the likeliest ones whose probabilities add up to p; 1 for all.
            num_inference_steps (`int`, *optional*):
                Passes of a masked model, 12 by default. An autoregressive one takes one per position, and no other
                number.
            choice_temperature (`float`, *optional*):
                Masked models: randomness in which tokens are kept, 4.5 by default; more makes images more diverse.
            generator (`torch.Generator` or one per image, *optional*): Source of randomness.
            output_type (`str`):
                `"pil"`; `"np"`, `(B, H, W, 3)` in [0, 1]; `"pt"`, `(B, 3, H, W)` in [0, 1]; `"indices"`, `(B, h, w)` or
                `(B, h, w, n)`, ready for `vqvae.decode_indices`.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple if not `return_dict`.

        Raises:
            ValueError: for classes that the model does not know, and options out of bounds.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} must be one of {', '.join(map(repr, OUTPUT_TYPES))}.")
        if num_images < 1:
            raise ValueError(f"num_images={num_images} must be at least 1.")
        sampling = TokenSampling(guidance_scale, temperature, top_k, top_p, generator)
        labels = self._labels(class_labels, num_images, guidance_scale)
        indices = self.token_model.sample(
            labels,
            num_images,
            sampling,
            progress=self.progress_bar,
            **self._schedule(num_inference_steps, choice_temperature),
        )
        images: Tensor | np.ndarray | list = indices
        if output_type != "indices":
            # Only `decode` brings back a model that is offloaded.
            images = self.vqvae.decode(indices).sample
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _schedule(self, steps: int | None, choice_temperature: float | None) -> dict[str, float]:
        """What a masked model's `sample` is to know besides, where it was said."""
        if isinstance(self.token_model, MaskedTokenModel):
            wanted = {"num_inference_steps": steps, "choice_temperature": choice_temperature}
            return {name: value for name, value in wanted.items() if value is not None}
        positions = self.token_model.num_positions
        if steps not in (None, positions):
            raise ValueError(
                f"num_inference_steps={steps}: an autoregressive model takes one step per position, {positions} of "
                "them. Leave it out."
            )
        if choice_temperature is not None:
            raise ValueError(f"choice_temperature={choice_temperature} is for masked models. Leave it out.")
        return {}

    def _labels(self, class_labels, num_images: int, guidance_scale: float) -> Tensor:
        """Class numbers for the model, `(B,)`."""
        if class_labels is None:
            if guidance_scale != 1:
                raise ValueError(f"guidance_scale={guidance_scale} needs class_labels to guide towards.")
            return torch.full((num_images,), self.token_model.no_class, device=self._execution_device)
        classes = self.token_model.config.num_classes
        if not classes:
            raise ValueError("class_labels are given, but the pipeline's token_model is unconditional.")
        numbers = class_numbers(class_labels, classes, self.config.id2label)
        return torch.tensor(numbers, device=self._execution_device).repeat_interleave(num_images)


def check_vocabulary(vqvae: VQGANModel, token_model: AutoregressiveTokenModel | MaskedTokenModel) -> None:
    """
    Raises:
        ValueError: for a model of other tokens than the VQ-GAN has.
    """
    ours = (vqvae.quantize.num_codes, vqvae.quantize.num_codebooks)
    theirs = (token_model.config.num_vq_embeddings, token_model.config.num_codebooks)
    if ours != theirs:
        raise ValueError(
            f"token_model has {theirs[1]} x {theirs[0]} codes per position, but vqvae has {ours[1]} x {ours[0]}: it was"
            " trained on the tokens of another model."
        )
