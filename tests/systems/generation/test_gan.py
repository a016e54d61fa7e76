"""Generators and critics: sizes, what norms and orthogonal layers promise, files."""

from __future__ import annotations

import json

import pytest
import torch

from volvelle.errors import UsageError, VolvelleError
from volvelle.parts.adversarial.gradient_penalty import gradient_norms
from volvelle.parts.transport.certified import Lipschitz, certified_w1
from volvelle.systems.generation.extractor import BackboneFeatures, PixelFeatures
from volvelle.systems.generation.gan import GAN, LipschitzCritic, read_gan, write_gan
from volvelle.systems.generation.gan_config import DCGAN, GANConfig, Orthogonal, ResNet

NETWORKS = [
    (DCGAN(4), DCGAN(4, "spectral")), (DCGAN(4), ResNet(4, "layer")), (ResNet(4), DCGAN(4, "batch")),
    (ResNet(4), Orthogonal((8, 4))),
]  # fmt: skip


def network(size=28, channels=1, pair=NETWORKS[0], seed=0):
    torch.manual_seed(seed)
    return GAN(GANConfig(size, channels, 6, *pair))


@pytest.mark.parametrize("pair", NETWORKS)
@pytest.mark.parametrize(("size", "channels"), [(8, 3), (28, 1), (37, 3)])
def test_any_size_comes_out_and_goes_in(size, channels, pair):
    net = network(size, channels, pair)
    pictures = net(net.latents(3))
    assert pictures.shape == (3, channels, size, size)
    assert pictures.abs().max() <= 1
    scores = net.critic(pictures)
    assert scores.shape == (3,)
    scores.sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_sampling_is_seeded_batched_and_leaves_the_mode_and_the_statistics_alone():
    net = network().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    draw = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    whole, parts = net.sample(7, generator=draw()), net.sample(7, generator=draw(), batch=3)
    torch.testing.assert_close(whole, parts)
    assert net.training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize("norm", ["layer", "none", "spectral"])
@pytest.mark.parametrize("kind", [DCGAN, ResNet])
def test_a_score_is_the_picture_s_own_without_batch_norm_and_not_with_it(kind, norm):
    x = torch.randn(4, 1, 28, 28)
    critic = network(pair=(DCGAN(4), kind(4, norm))).critic.eval()
    together, alone = critic(x), torch.cat([critic(one[None]) for one in x])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    mixed = network(pair=(DCGAN(4), kind(4, "batch"))).critic.train()
    assert not torch.allclose(mixed(x), torch.cat([mixed(one[None].expand(2, -1, -1, -1))[:1] for one in x]), atol=1e-5)


def test_the_orthogonal_critic_is_1_lipschitz_however_its_weights_are():
    torch.manual_seed(0)
    for scale in (1e-3, 1.0, 1e3):
        critic = LipschitzCritic(6, (12, 8), group=4).double()
        with torch.no_grad():
            for p in critic.parameters():
                p.copy_(scale * torch.randn_like(p))
        x, y = 3 * torch.randn(2, 200, 6, dtype=torch.float64)
        assert ((critic(x) - critic(y)).abs() <= critic.lipschitz() * (x - y).norm(dim=1) + 1e-12).all()
        assert critic.lipschitz() <= 1 + 1e-12
        assert gradient_norms(critic, x).max() <= 1 + 1e-9
    assert isinstance(critic, Lipschitz)
    assert not isinstance(network().critic, Lipschitz)
    pictures = network(pair=NETWORKS[3])
    assert certified_w1(pictures.critic, pictures.sample(5), torch.ones(4, 1, 28, 28)) >= 0


@pytest.mark.parametrize("pair", NETWORKS)
def test_files_keep_networks_and_configurations(pair, tmp_path):
    net = network(pair=pair).eval()
    write_gan(net, tmp_path)
    again = read_gan(tmp_path)
    assert again.config == net.config
    z = net.latents(2)
    assert torch.equal(net(z), again(z))
    assert torch.equal(net.critic(net(z)), again.critic(again(z)))
    values = json.loads((tmp_path / "config.json").read_text())
    for change, said in (
        ({"critic": {"type": "dcgann"}}, "unknown critic"),
        ({"critic": 3}, "no critic"),
        ({"x": 1}, "x"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(VolvelleError, match=said):
            read_gan(tmp_path)


def test_configurations_that_cannot_be_are_named():
    for wrong in (
        {"size": 7},
        {"channels": 2},
        {"latent": 0},
        {"critic": Orthogonal(())},
        {"critic": DCGAN(4, "none!")},
    ):
        with pytest.raises(UsageError, match="gan:"):
            GANConfig(**wrong)
    with pytest.raises(UsageError, match="for the critic"):
        GANConfig(generator=Orthogonal())


def test_extractors():
    from volvelle.systems.backbone.load import backbone

    x = torch.randn(3, 1, 28, 28).clamp(-1, 1)
    assert PixelFeatures()(x).shape == (3, 64)
    found = BackboneFeatures(backbone("snet49"), "snet49", 32).train()
    features = found(x)
    assert features.shape[0] == 3
    assert torch.equal(features, found(x.expand(-1, 3, -1, -1)))  # grey is three equal channels
    torch.testing.assert_close(features[1:2], found(x[1:2]), atol=1e-5, rtol=1e-4)  # running statistics
    assert found.name == "snet49-32"
    assert not features.requires_grad
