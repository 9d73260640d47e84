import pytest
import torch

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def vit(build):
    def make(**options):
        return build("ConditionalRoutedViT", **options).double()

    return make


def norm(x, layer):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def by_hand(model, images, patch_height, patch_width):
    """Patches and positions one by one, then the layers in their order."""
    _, patch_norm, into, dim_norm = model.to_patch_embedding
    dim = into.out_features
    frequencies = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4 - 1)).double()
    rows = []
    for i in range(0, images.shape[2], patch_height):
        row = []
        for j in range(0, images.shape[3], patch_width):
            patch = images[:, :, i : i + patch_height, j : j + patch_width].movedim(1, -1).flatten(1)
            features = norm(norm(patch, patch_norm) @ into.weight.T + into.bias, dim_norm)
            y, x = i // patch_height * frequencies, j // patch_width * frequencies
            row.append(features + torch.cat((x.sin(), x.cos(), y.sin(), y.cos())))
        rows.append(torch.stack(row, dim=1))
    x = torch.stack(rows, dim=1)
    for attention, feed_forward in model.transformer.layers:
        x = x + attention(x)
        x = x + torch.stack([feed_forward(each.flatten(0, 1)[None])[0].view(each.shape) for each in x])
    _, head_norm, head = model.linear_head
    return norm(x.mean((1, 2)), head_norm) @ head.weight.T + head.bias


@pytest.mark.parametrize(
    ("image_size", "patch_size"), [(32, 4), ((32, 24), 4), (32, (8, 4)), ((16, 32), (4, 8))], ids=str
)
@pytest.mark.parametrize("options", [{}, {"attn_num_routed_kv": 2, "flash_attn": False, "channels": 1}], ids=str)
def test_by_hand(vit, image_size, patch_size, options):
    model = vit(image_size=image_size, patch_size=patch_size, **options)
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    patches = patch_size if isinstance(patch_size, tuple) else (patch_size, patch_size)
    images = IMAGES[:, : options.get("channels", 3), :height, :width]
    # The position embedding is computed in fp32, of numbers up to 8.
    torch.testing.assert_close(model(images), by_hand(model, images, *patches), rtol=1e-4, atol=1e-5)


def test_options_reach_every_layer(vit):
    model = vit(
        depth=3,
        router_straight_through=False,
        router_kwargs={"n_iters": 7},
        router_use_triton=True,
        flash_attn=False,
        attn_num_routed_kv=2,
        attn_rotary_emb=True,
        attn_light_rotary_emb=True,
        default_coor_descent_eps=0.5,
    )
    assert len(model.transformer.layers) == 3
    for attention, feed_forward in model.transformer.layers:
        assert attention.kv_router.num_routing_tokens == 2
        assert not attention.heavy_attn.use_flash
        assert attention.rotary_emb
        assert attention.light_rotary_emb
        for router in (attention.q_router, attention.kv_router, feed_forward.router):
            assert (router.eps, router.n_iters, router.straight_through, router.use_triton) == (0.5, 7, False, True)
    assert vit(router_kwargs={"eps": 0.2}).transformer.layers[0][1].router.eps == 0.2
    assert vit().transformer.layers[0][1].router.eps == 1.0


def test_every_parameter_has_a_gradient(vit):
    model = vit()
    model(IMAGES).square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_wrong_options_are_named(build):
    with pytest.raises(ValueError, match=r"patch_size must be a divisor of image_size = \(32, 30\), got \(4, 4\)"):
        build("ConditionalRoutedViT", image_size=(32, 30), patch_size=(4, 4))
    with pytest.raises(ValueError, match="dim must be a multiple of 4, got 18"):
        build("ConditionalRoutedViT", dim=18)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 30, 32), (2, 3, 32, 30)], ids=str)
def test_wrong_images_are_named(vit, shape):
    with pytest.raises(ValueError, match=r"img must be of shape \(b, 3, h, w\) with h a multiple of 4 and w of 4, got"):
        vit()(torch.randn(shape))
