"""How well the codebook is used, and how close reconstructions come."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ..losses.image_losses import LPIPS
from ..modeling_vqgan import VQGANModel

SSIM_WINDOW = 11  # pixels


def perplexity(counts: Tensor) -> float:
    """exp(-Σ p log p) of a histogram `(K,)`: how many equally used codes would be as hard to guess. 0 if empty."""
    if not counts.any():
        return 0.0
    p = counts[counts > 0].double()
    p = p / p.sum()
    return float(torch.exp(-(p * p.log()).sum()))


def mean_perplexity(counts: Tensor, num_codebooks: int) -> float:
    """Mean over codebooks of the perplexity of each one's histogram; `counts` is `(n*K,)`."""
    return sum(perplexity(own) for own in counts.view(num_codebooks, -1)) / num_codebooks


def number_codes(indices: Tensor, num_codes: int, num_codebooks: int) -> Tensor:
    """Indices `(..., n)` of n codebooks as numbers in [0, n*K), flat; with one codebook, `indices` flattened."""
    if num_codebooks > 1:
        indices = indices + num_codes * torch.arange(num_codebooks, device=indices.device)
    return indices.flatten()


def gather_rows(rows: Tensor) -> Tensor:
    """`(N, ...)` of every process, in the order of ranks: `(processes * N, ...)`. N must be the same everywhere."""
    if not (dist.is_available() and dist.is_initialized()):  # asked at each call: a process group may come later
        return rows
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


def sum_over_processes(own: Tensor, device: torch.device) -> Tensor:
    """Sum of a CPU tensor over all processes, on CPU; `device` is where their process group communicates."""
    if not (dist.is_available() and dist.is_initialized()):
        return own
    shared = own.to(device, copy=True)
    dist.all_reduce(shared)
    return shared.cpu()


@dataclass
class CodebookReport:
    """
    State of a codebook over a window of steps, over all processes.

    Args:
        perplexity (`float`): exp(entropy) of the histogram of codes, in [1, K]; with several codebooks, their mean.
        usage (`float`): Share of codes hit at least once in the window, in [0, 1].
        dead_codes (`int`): Codes not hit in the window.
        top_code_share (`float`): Share of its codebook's positions that the most used code holds, in [0, 1].
        oldest_code (`int`): Steps since the longest unused code was hit.
        window_steps (`int`): Steps in the window so far.
        positions (`int`): Latent positions counted in the window.
    """

    perplexity: float
    usage: float
    dead_codes: int
    top_code_share: float
    oldest_code: int
    window_steps: int
    positions: int


class CodebookHealth:
    """
    Histogram of code use over the last `window` updates, the same on every process.

    `update` gathers the indices of all processes, so one process that sees 64 images and two that see 32 each report
    the same numbers.

    Args:
        num_codes (`int`): K, codes per codebook.
        num_codebooks (`int`): n, codes per latent position.
        window (`int`): How many updates (training steps) count.
    """

    def __init__(self, num_codes: int, num_codebooks: int = 1, window: int = 100):
        if window < 1:
            raise ValueError(f"window={window} must be at least 1 step.")
        self.num_codes, self.num_codebooks = num_codes, num_codebooks
        self.window = window
        self.recent: deque[Tensor] = deque()
        self.counts = torch.zeros(num_codebooks * num_codes, dtype=torch.int64)
        self.age = torch.zeros_like(self.counts)  # steps since each code was last hit
        self.best_perplexity = 0.0  # at any diagnosis

    def update(self, indices: Tensor) -> None:
        """Count one step's `indices`, `(B, h, w)` or `(B, h, w, n)`; call it on every process, with equal shapes."""
        indices = number_codes(gather_rows(indices.detach()), self.num_codes, self.num_codebooks).cpu()
        hits = torch.bincount(indices, minlength=len(self.counts))
        self.counts += hits
        self.age.add_(1)[hits > 0] = 0
        self.recent.append(indices.to(torch.int32))
        if len(self.recent) > self.window:
            self.counts -= torch.bincount(self.recent.popleft(), minlength=len(self.counts))

    def report(self) -> CodebookReport:
        total = int(self.counts.sum()) // self.num_codebooks
        return CodebookReport(
            perplexity=mean_perplexity(self.counts, self.num_codebooks),
            usage=float((self.counts > 0).float().mean()),
            dead_codes=int((self.counts == 0).sum()),
            top_code_share=float(self.counts.max()) / max(total, 1),
            oldest_code=int(self.age.max()),
            window_steps=len(self.recent),
            positions=total,
        )

    def diagnosis(self, low: float = 0.1, fall: float = 0.5) -> str | None:
        """
        What is wrong with the codebook, in words that name the remedies; `None` if nothing is, or before the window has
        filled for the first time.

        It is called collapsed when perplexity is below `low` times what the window allows (K codes, or as many as there
        were positions), and falling when it is below `fall` times its best so far.
        """
        if len(self.recent) < self.window:
            return None
        report = self.report()
        self.best_perplexity = max(self.best_perplexity, report.perplexity)
        possible = min(self.num_codes, report.positions)
        if report.perplexity < low * possible:
            problem = f"has collapsed: perplexity {report.perplexity:.1f} of {possible} possible"
        elif report.perplexity < fall * self.best_perplexity:
            problem = f"is shrinking: perplexity {report.perplexity:.1f}, {self.best_perplexity:.1f} before"
        else:
            return None
        return (
            f"The codebook {problem}, {report.usage:.1%} of the codes used in {self.window} steps. "
            "Remedies, best first: --quantizer vq_ema with --codebook_init data and --dead_code_restart_steps; "
            "low-dimensional cosine codes (--vq_embed_dim 8 --codebook_l2_norm true); --quantizer simvq or fsq; fewer "
            "codes (--num_vq_embeddings)."
        )

    def state_dict(self) -> dict:
        return {
            "recent": list(self.recent),
            "counts": self.counts,
            "age": self.age,
            "best_perplexity": self.best_perplexity,
        }

    def load_state_dict(self, state: dict) -> None:
        self.recent, self.counts, self.age = deque(state["recent"]), state["counts"], state["age"]
        self.best_perplexity = state["best_perplexity"]


class DiscriminatorHealth:
    """
    How the game between the two networks stands, over the last `window` steps of the discriminator.

    Args:
        window (`int`): Steps over which means are taken, and before which nothing is said.
    """

    def __init__(self, window: int = 200):
        self.window = window
        self.recent: deque[tuple[float, float, float]] = deque(maxlen=window)  # accuracies on real and fake, logits gap

    def update(self, watched: dict[str, float]) -> None:
        """Count one step's `StepOutput.watched`; an empty one, from before the start, does not count."""
        if watched:
            gap = watched["logits_real"] - watched["logits_fake"]
            self.recent.append((watched["disc_real_accuracy"], watched["disc_fake_accuracy"], gap))

    def diagnosis(self, won: float = 0.99, dead: float = 0.01) -> str | None:
        """
        What is wrong with the discriminator, in words that name the remedies; `None` if nothing is.

        It has won when it is right about more than a share `won` of both the images and the reconstructions: its
        gradient then says little about how to improve. It is dead when its mean logits differ by less than `dead`.
        """
        if len(self.recent) < self.window:
            return None
        real, fake, gap = (sum(figures) / self.window for figures in zip(*self.recent, strict=True))
        if min(real, fake) > won:
            return (
                f"The discriminator has won: right about {real:.1%} of the images and {fake:.1%} of the "
                f"reconstructions over {self.window} steps. Remedies: a lower --disc_learning_rate, a later "
                "--disc_start, --r1_weight; on little data --diff_augment color translation cutout and --lecam_weight."
            )
        if abs(gap) < dead:
            return (
                f"The discriminator is dead: its logits for images and reconstructions differ by {gap:.3f} over "
                f"{self.window} steps. Remedies: a higher --disc_learning_rate or --disc_max_grad_norm, a lower "
                "--r1_weight or --lecam_weight, more --disc_channels."
            )
        return None

    def state_dict(self) -> dict:
        return {"recent": list(self.recent)}

    def load_state_dict(self, state: dict) -> None:
        self.recent = deque(map(tuple, state["recent"]), maxlen=self.window)


@dataclass
class ReconstructionReport:
    """
    Means over images of per-image figures, so that neither batch size nor the number of processes changes them.

    Args:
        psnr (`float`): dB, on pixels clamped and mapped to [0, 1], not rounded to 8 bits.
        ssim (`float`): On the same pixels; gaussian windows of 11 pixels with σ 1.5 that lie inside the image.
        lpips (`float`): LPIPS v0.1; which network, the caller knows.
        l1 (`float`): Mean absolute error in [-1, 1] pixels.
        perplexity (`float`): Over all codes of all images, as `CodebookReport.perplexity`.
        usage (`float`): Share of codes hit at least once by these images.
        num_images (`int`): How many images.
    """

    psnr: float
    ssim: float
    lpips: float | None
    l1: float
    perplexity: float
    usage: float
    num_images: int

    def as_dict(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def pixel_figures(sample: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    """
    `psnr` (dB), `ssim` and `l1` per image, each `(B,)`, of float32 images `(B, 3, H, W)` in [-1, 1].

    PSNR and SSIM are taken on [0, 1], l1 on [-1, 1]. A perfect reconstruction has PSNR 100.
    """
    shown, real = sample / 2 + 0.5, pixels / 2 + 0.5  # [0, 1]: SSIM depends on where zero is
    psnr = peak_signal_noise_ratio(shown, real, data_range=1.0, reduction="none", dim=(1, 2, 3))
    options = {"data_range": 1.0, "reduction": "none", "return_full_image": True}
    _, ssim_map = structural_similarity_index_measure(shown, real, **options)
    # torchmetrics also averages over windows that reach past the border, into mirrored pixels; the paper
    # (https://doi.org/10.1109/TIP.2003.819861) and scikit-image do not. On small images that is 0.03 of difference.
    top, left = (min(SSIM_WINDOW // 2, (side - 1) // 2) for side in pixels.shape[2:])
    inside = ssim_map[..., top : pixels.shape[2] - top, left : pixels.shape[3] - left]
    l1 = (sample - pixels).abs()
    return {"psnr": psnr.clamp(max=100), "ssim": inside.mean(dim=(1, 2, 3)), "l1": l1.mean(dim=(1, 2, 3))}


@torch.no_grad()
def evaluate_reconstruction(
    model: VQGANModel, images: Iterable[Tensor], perceptual: LPIPS | None = None
) -> ReconstructionReport:
    """
    Reconstruct `images`, an iterable of `(B, 3, H, W)` batches in [-1, 1] of any size, and measure.

    With several processes, each passes its own share of the images and all get the same report.

    Raises:
        ValueError: if there is no image on any process.
    """
    device = model.device
    totals = torch.zeros(5, dtype=torch.float64)  # psnr, ssim, lpips, l1, count; on CPU: MPS has no float64
    codes, codebooks = model.quantize.num_codes, model.quantize.num_codebooks
    counts = torch.zeros(codebooks * codes, dtype=torch.int64, device=device)
    training = model.training
    model.eval()
    try:
        for pixels in images:
            pixels = pixels.to(device)
            output = model(pixels)
            sample = output.sample.float().clamp(-1, 1)
            psnr, ssim, error = pixel_figures(sample, pixels).values()
            lpips = perceptual(sample, pixels) if perceptual is not None else torch.zeros_like(error)
            totals[:4] += torch.stack([psnr, ssim, lpips, error]).cpu().double().sum(dim=1)
            totals[4] += len(pixels)
            counts += torch.bincount(number_codes(output.indices, codes, codebooks), minlength=len(counts))
    finally:
        model.train(training)
    *sums, number = sum_over_processes(totals, device).tolist()
    counts = sum_over_processes(counts.cpu(), device)
    if not number:
        raise ValueError("there are no images to evaluate on.")
    psnr, ssim, lpips, error = (value / number for value in sums)
    return ReconstructionReport(
        psnr=psnr,
        ssim=ssim,
        lpips=lpips if perceptual is not None else None,
        l1=error,
        perplexity=mean_perplexity(counts, codebooks),
        usage=float((counts > 0).float().mean()),
        num_images=int(number),
    )


@dataclass
class LatentStatistics:
    """
    Distribution of the continuous latents, over images, positions and (for the scalars) channels.

    Args:
        mean, std (`float`): Over all channels together; std is about `mean`.
        channel_means, channel_stds (`list[float]`): Of each of the D channels, about its own mean.
        num_images (`int`): How many images.
    """

    mean: float
    std: float
    channel_means: list[float]
    channel_stds: list[float]
    num_images: int


@torch.no_grad()
def measure_latents(model: VQGANModel, load_batch: Callable[[int], Tensor], num_batches: int) -> LatentStatistics:
    """
    Encode the batches `load_batch(0)` to `load_batch(num_batches - 1)`, each `(B, 3, H, W)` in [-1, 1], and measure.

    Process r of n encodes batches r, r + n, ... Sums are taken per batch in float64 and added in the order of batches,
    so any number of processes gives the same result to the last bit.
    """
    training = model.training
    model.eval()
    # Per batch: Σz and Σz² of each channel, positions, images. Other processes' rows stay 0.
    dim = model.config.vq_embed_dim
    table = torch.zeros(num_batches, 2 * dim + 2, dtype=torch.float64)
    distributed = dist.is_available() and dist.is_initialized()
    rank, processes = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    for number in range(rank, num_batches, processes):
        latents = model.encode(load_batch(number).to(model.device)).latents.cpu().double()
        sums = latents.sum(dim=(0, 2, 3)), latents.square().sum(dim=(0, 2, 3))
        table[number] = torch.cat([*sums, torch.tensor([latents[:, 0].numel(), len(latents)])])
    model.train(training)
    totals = sum_over_processes(table, model.device).sum(dim=0)
    means, squares = (totals[: 2 * dim] / totals[-2]).view(2, dim)
    return LatentStatistics(
        mean=float(means.mean()),
        std=float((squares.mean() - means.mean().square()).clamp(min=0).sqrt()),  # rounding, where all are equal
        channel_means=means.tolist(),
        channel_stds=(squares - means.square()).clamp(min=0).sqrt().tolist(),
        num_images=int(totals[-1]),
    )
