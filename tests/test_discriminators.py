import pytest
import torch
import torch.nn.functional as F

from hf_vqgan.losses.discriminators import (
    DINODiscriminator,
    PatchDiscriminator,
    StyleGANDiscriminator,
    diff_augment,
    draw_augmentations,
)
from hf_vqgan.losses.image_losses import lecam_penalty, r1_penalty
from hf_vqgan.measurement.metrics import DiscriminatorHealth


@pytest.fixture(params=["patchgan", "stylegan", "dino"])
def discriminator(request, backbone):
    torch.manual_seed(0)
    match request.param:
        case "patchgan":
            return PatchDiscriminator(channels=8, num_layers=2)
        case "stylegan":
            return StyleGANDiscriminator(32, channels=8)
        case "dino":
            return DINODiscriminator(backbone)


def test_an_images_logits_depend_on_it_alone(discriminator):
    discriminator.eval()  # spectral norms stand still
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    together = discriminator(images)
    alone = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert len(together.flatten(1).mean(dim=1).unique()) == 3


def test_it_can_learn_to_tell_two_kinds_apart(discriminator):
    """Every layer has to be able to train: smooth against noisy images, in a few steps."""
    noisy = torch.rand(8, 3, 32, 32) * 2 - 1
    smooth = F.interpolate(noisy[:, :, ::8, ::8], size=(32, 32), mode="bilinear")
    trained = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=5e-3)
    for _ in range(30):
        loss = F.softplus(-discriminator(smooth)).mean() + F.softplus(discriminator(noisy)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)
    assert discriminator(smooth).mean() - discriminator(noisy).mean() > 1


def test_dino_backbone_stays_as_it_is(backbone):
    discriminator = DINODiscriminator(backbone).train()
    assert not discriminator.backbone.model.training and discriminator.heads.training
    assert not any(parameter.requires_grad for parameter in discriminator.backbone.parameters())
    images = torch.rand(1, 3, 48, 40, requires_grad=True)  # resized to what the backbone knows
    logits = discriminator(images)
    assert logits.shape == (1, 4, 16)
    logits.sum().backward()
    assert images.grad.any()


def test_dino_without_backbone_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="disc_backbone='.*nowhere' cannot be loaded.*--disc_type patchgan"):
        DINODiscriminator(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("resolution, side", [(8, 4), (32, 4), (96, 6), (56, 7)])
def test_stylegan_halves_to_its_last_map(resolution, side):
    discriminator = StyleGANDiscriminator(resolution, channels=4)
    assert discriminator.hidden.kernel_size == (side, side)
    assert discriminator(torch.zeros(2, 3, resolution, resolution)).shape == (2, 1, 1, 1)


@pytest.mark.parametrize("resolution", [4, 36, 33])
def test_stylegan_refuses_sides_that_do_not_halve(resolution):
    with pytest.raises(ValueError, match=f"resolution={resolution} does not suit"):
        StyleGANDiscriminator(resolution)


# ------------------------------------------------------------------------------------------------ augmentation


def test_augmentations_do_what_they_say():
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    none = torch.full((2, 2), 0.5)
    # brightness u - 0.5, saturation 2u, contrast 0.5 + u: u = 0.5 leaves an image as it is
    unchanged = diff_augment(images, ["color", "translation"], {"color": torch.full((2, 3), 0.5), "translation": none})
    torch.testing.assert_close(unchanged, images)
    grey = diff_augment(images, ["color"], {"color": torch.tensor([[0.5, 0.0, 0.5]]).expand(2, 3)})
    torch.testing.assert_close(grey, images.mean(dim=1, keepdim=True).expand_as(images))
    brighter = diff_augment(images, ["color"], {"color": torch.tensor([[0.7, 0.5, 0.5]]).expand(2, 3)})
    torch.testing.assert_close(brighter, images + 0.2)

    # an eighth of 16 pixels: u = 0 is -2, u -> 1 is +2
    shifted = diff_augment(images, ["translation"], {"translation": torch.tensor([[0.99, 0.0], [0.5, 0.99]])})
    torch.testing.assert_close(shifted[0], F.pad(images[0], (0, 2, 2, 0))[:, :16, 2:])  # down 2, left 2
    torch.testing.assert_close(shifted[1], F.pad(images[1], (2, 0))[:, :, :16])  # right 2

    cut = diff_augment(images, ["cutout"], {"cutout": torch.tensor([[0.5, 0.5], [0.0, 0.99]])})
    expected = images.clone()
    expected[0, :, 4:12, 4:12] = 0  # half the side around the centre
    expected[1, :, :4, 11:] = 0  # centred on the first row and the last column, 15
    torch.testing.assert_close(cut, expected)


def test_augmentation_is_differentiable():
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    draws = draw_augmentations(2, torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: diff_augment(x, ["color", "translation", "cutout"], draws), images)


# ------------------------------------------------------------------------------------------------ penalties, health


def test_r1_of_a_linear_discriminator_is_its_weights_square():
    weight = torch.rand(3, 4, 4, dtype=torch.float64, requires_grad=True)
    images = torch.rand(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty((images * weight).sum(dim=(1, 2, 3)), images)
    assert penalty.item() == pytest.approx(weight.square().sum().item())
    (gradient,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(gradient, 2 * weight)


def test_lecam_closed_form():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -2.0])
    expected = (1.5**2 + 0) / 2 + (0.5**2 + 3.0**2) / 2
    assert lecam_penalty(real, fake, anchor_real=1.0, anchor_fake=0.5).item() == pytest.approx(expected)


def test_discriminator_health_speaks_up_once_its_window_is_full():
    def after(real, fake, gap, steps=4):
        health = DiscriminatorHealth(window=4)
        for _ in range(steps):
            health.update(
                {"disc_real_accuracy": real, "disc_fake_accuracy": fake, "logits_real": gap, "logits_fake": 0}
            )
            health.update({})  # a step before the discriminator's start
        again = DiscriminatorHealth(window=4)
        again.load_state_dict(health.state_dict())
        assert again.diagnosis() == health.diagnosis()
        return health.diagnosis()

    assert "has won: right about 100.0% of the images" in after(1.0, 0.995, 3.0)
    assert "is dead: its logits for images and reconstructions differ by 0.001" in after(0.6, 0.4, 0.001)
    assert after(1.0, 1.0, 3.0, steps=3) is None
    assert after(0.7, 0.6, 0.4) is None and after(1.0, 0.9, 2.0) is None
