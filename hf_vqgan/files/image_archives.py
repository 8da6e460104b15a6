"""Archives of images and of their statistics (.npz), as guided-diffusion's evaluations exchange them."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

IMAGES = "arr_0"
MOMENTS = (("mu", "sigma"), ("mu_s", "sigma_s"))  # of pooled features; of spatial ones


@dataclass
class ImageArchive:
    """
    Args:
        path (`str`): For error messages.
        images (`ndarray` of shape `(N, H, W, 3)`, *optional*): uint8.
        moments (`tuple`, *optional*): Mean `(F,)` and covariance `(F, F)` of features, float64.
        spatial_moments (`tuple`, *optional*): The same of the features for sFID.
    """

    path: str
    images: np.ndarray | None = None
    moments: tuple[np.ndarray, np.ndarray] | None = None
    spatial_moments: tuple[np.ndarray, np.ndarray] | None = None


def read_image_archive(path: str | Path) -> ImageArchive:
    """
    Read arrays, never pickled objects.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such an archive, or holds arrays of other shapes, types or values.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected an archive of images or statistics (.npz).")
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
            wanted = {IMAGES, *(name for pair in MOMENTS for name in pair)}
            found = {name: archive[name] for name in archive.files if name in wanted}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not an .npz archive of plain arrays: {error}.") from error
    if not found:
        raise ValueError(f"{path} holds neither images ({IMAGES}) nor statistics (mu and sigma).")
    return ImageArchive(str(path), _images(path, found), *(_moments(path, found, *names) for names in MOMENTS))


def _images(path: str | Path, found: dict[str, np.ndarray]) -> np.ndarray | None:
    images = found.get(IMAGES)
    if images is None:
        return None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(
            f"{path}: {IMAGES} is {images.dtype} of shape {images.shape}; expected images, uint8 (N, height, width, 3)."
        )
    return images


def _moments(
    path: str | Path, found: dict[str, np.ndarray], mean_name: str, covariance_name: str
) -> tuple[np.ndarray, np.ndarray] | None:
    mean, covariance = found.get(mean_name), found.get(covariance_name)
    if mean is None and covariance is None:
        return None
    if mean is None or covariance is None:
        missing = mean_name if mean is None else covariance_name
        raise ValueError(f"{path}: {missing} is missing beside {({mean_name, covariance_name} - {missing}).pop()}.")
    sides = (mean.size,), (mean.size, mean.size)
    for name, array, shape in zip((mean_name, covariance_name), (mean, covariance), sides, strict=True):
        is_real = array.dtype.kind == "f" and array.size > 0
        if not (is_real and array.shape == shape and np.isfinite(array).all()):
            raise ValueError(
                f"{path}: {name} is {array.dtype} of shape {array.shape}; expected finite floating-point numbers: "
                f"{mean_name} (F,) and {covariance_name} (F, F)."
            )
    return mean.astype(np.float64), covariance.astype(np.float64)
