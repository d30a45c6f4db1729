"""The UNet against references: the paper's numbers, diffusers, torch's own functions, and hand-written loops."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from common.device import multiply_in_bfloat16, student_dtype
from model import (
    LADDER,
    PRESETS,
    Attention,
    RMSNorm,
    UNet,
    UNetConfig,
    conv3x3,
    ladder,
    rope_table,
    rotate,
    zero_branches,
)
from studies import sizes
from studies.sizes import count, count_parts

# Our reconstruction of the paper's ladder: millions of parameters, GMACs at a 128x128 latent (see README).
EXPECTED = {"a": (634.1, 1268), "b": (623.6, 1053), "c1": (475.0, 653), "c2": (529.8, 759), "d1": (464.1, 667),
            "d2": (390.7, 628), "e": (386.4, 629), "f": (386.4, 629)}  # fmt: skip


def small(step="f", **changes):
    """A ladder step at small width."""
    base = dict(channels=(32, 64, 96), mid_depth=1, head_dim=32, groups=16, text_dim=24, time_dim=48, latent_channels=4)
    depth = (0, 1, 2) if step in ("a", "b", "c1", "c2", "d1", "d2") else (1, 1, 2)
    switches = {
        k: v for k, v in vars(ladder(step)).items() if k in LADDER["a"] and k not in ("depth", "mid_depth", "time_dim")
    }
    return UNetConfig(**{**base, **switches, "depth": depth, **changes})


def inputs(cfg, batch=2, side=8, tokens=5):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(batch, cfg.latent_channels, side, side, generator=g), torch.rand(batch, generator=g),
            torch.randn(batch, tokens, cfg.text_dim, generator=g))  # fmt: skip


@pytest.mark.parametrize("step", LADDER)
def test_ladder_meets_the_papers_parameters_and_macs(step):
    params, macs = count(ladder(step), 128)
    assert params / 1e6 == pytest.approx(EXPECTED[step][0], rel=0.01)
    assert macs / 1e9 == pytest.approx(EXPECTED[step][1], rel=0.01)


def test_presets_meet_the_paper():
    params, macs = count(PRESETS["imagenet"], 32)
    assert params / 1e6 == pytest.approx(372, rel=0.01)
    assert macs / 1e9 == pytest.approx(38, rel=0.05)
    parts = count_parts(PRESETS["imagenet"], 32)
    assert sum(m for _, m in parts.values()) == macs
    assert sum(p for p, _ in parts.values()) == params - 2 * 256  # the gains and offsets of norm_out
    assert count(PRESETS["t2i"], 32)[0] / 1e6 == pytest.approx(379, rel=0.01)


def test_json_output(capsys):
    sizes.main(["--json", "--parts"])
    table = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in table["ladder"]] == list(LADDER)
    assert set(table["ladder"][0]) == {"step", "params", "macs_32", "macs_128"}
    assert set(table["presets"]) == set(PRESETS)
    assert sum(macs for _, macs in table["parts"]["imagenet"].values()) == count(PRESETS["imagenet"], 32)[1]


def to_diffusers(name):
    """Our parameter names in step a -> diffusers' names for the same tensors."""
    for ours, theirs in (
        ("time_mlp.0", "time_embedding.linear_1"), ("time_mlp.2", "time_embedding.linear_2"), ("norm_out", "conv_norm_out"),
        ("time_proj", "time_emb_proj"), ("shortcut", "conv_shortcut"), ("to_out", "to_out.0"), (".ff.proj_in", ".ff.net.0.proj"),
        (".ff.proj_out", ".ff.net.2"), (".blocks.", ".transformer_blocks."), ("mid.0", "mid_block.resnets.0"),
        ("mid.1", "mid_block.attentions.0"), ("mid.2", "mid_block.resnets.1"),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    parts = name.split(".")
    if parts[0] in ("down", "up"):
        kind = {"resblock": "resnets", "transformer": "attentions"}
        if parts[2] == "layers":
            parts = [f"{parts[0]}_blocks", parts[1], kind[parts[4]], parts[3], *parts[5:]]
        else:  # the resampler
            rest = [p for p in parts[3:] if p != "conv"]
            parts = [f"{parts[0]}_blocks", parts[1], f"{parts[0]}samplers", "0", "conv", *rest]
    return ".".join(parts)


def test_step_a_is_diffusers_unet():
    cfg = small("a", text_dim=40)
    torch.manual_seed(0)
    ours = UNet(cfg).eval()
    theirs = UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=cfg.channels, layers_per_block=2, norm_num_groups=cfg.groups,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2), attention_head_dim=tuple(c // cfg.head_dim for c in cfg.channels),
        cross_attention_dim=40, use_linear_projection=True, time_embedding_dim=cfg.time_dim,
    ).eval()  # fmt: skip
    # diffusers takes the middle's depth from the last stage; ours is a number of its own.
    theirs.mid_block.attentions[0].transformer_blocks = theirs.mid_block.attentions[0].transformer_blocks[
        : cfg.mid_depth
    ]
    weights = {to_diffusers(name): w for name, w in ours.state_dict().items()}
    theirs.load_state_dict(weights, strict=True)
    x, t, text = inputs(cfg)
    with torch.no_grad():
        a, b = ours(x, t, text), theirs(x, 1000 * t, text).sample
    assert (a - b).abs().max() < 1e-4
    assert a.std() > 1e-2  # and it is not a comparison of zeros


@pytest.mark.parametrize("step", LADDER)
def test_every_step_runs_forward_and_backward(step):
    cfg = small(step)
    net = UNet(cfg)
    x, t, text = inputs(cfg)
    v = net(x, t, text, torch.ones(2, 5, dtype=torch.bool))
    assert v.shape == x.shape
    v.square().mean().backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent  # every weight takes part


@pytest.mark.parametrize("name", PRESETS)
def test_presets_keep_their_shape_on_the_meta_device(name):
    with torch.device("meta"):
        cfg = PRESETS[name]
        out = UNet(cfg)(torch.empty(2, 16, 16, 24), torch.empty(2), torch.empty(2, 7, cfg.text_dim))
    assert out.shape == (2, 16, 16, 24)


def test_tiny_preset_climbs_the_ladder_too():
    for step in LADDER:
        cfg = ladder(step, PRESETS["tiny"])
        assert cfg.channels == PRESETS["tiny"].channels
        assert cfg.separable == (step not in ("a", "b"))
    assert ladder("f", PRESETS["tiny"]) == PRESETS["tiny"]


def test_multi_query_attention_is_the_written_out_loop():
    cfg = small("f", rope=False)
    torch.manual_seed(1)
    attention = Attention(cfg, 64, context_dim=24)
    for norm in (attention.norm_q, attention.norm_k):
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    x, context = torch.randn(2, 6, 64), torch.randn(2, 5, 24)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    expected = torch.zeros(2, 6, 64)

    def rms(v, weight):
        return v / (v.pow(2).mean() + 1e-6).sqrt() * weight

    for b in range(2):
        keys = [rms(attention.to_k.weight @ context[b, j], attention.norm_k.weight) for j in range(5)]
        values = [attention.to_v.weight @ context[b, j] for j in range(5)]
        for i in range(6):
            q = attention.to_q.weight @ x[b, i]
            heads = []
            for h in range(2):  # two query heads, one key and one value
                query = rms(q[h * 32 : (h + 1) * 32], attention.norm_q.weight)
                logits = torch.stack([query @ keys[j] / 32**0.5 for j in range(5)])
                weights = logits.masked_fill(~mask[b], float("-inf")).softmax(0)
                heads.append(sum(w * value for w, value in zip(weights, values, strict=True)))
            expected[b, i] = attention.to_out(torch.cat(heads))
    assert torch.allclose(attention(x, context, mask[:, None, None, :]), expected, atol=1e-5)


def test_rms_norm_is_torchs():
    norm = RMSNorm(32)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    x, grad = (torch.randn(3, 4, 32) * 10).requires_grad_(), torch.randn(3, 4, 32)
    ours, theirs = norm(x), F.rms_norm(x, (32,), norm.weight, eps=1e-6)
    assert torch.allclose(ours, theirs, atol=1e-5)
    wanted = [x, norm.weight]
    for a, b in zip(*(torch.autograd.grad(y, wanted, grad) for y in (ours, theirs)), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(norm(x), ours, atol=1e-6)
    assert norm(torch.zeros(1, 32)).isfinite().all()


def test_half_precision_of_a_gpu_gives_nearly_the_same_gradient():
    """Autocast to bfloat16, as training does on a GPU, here on the CPU."""
    torch.manual_seed(0)
    net, x = UNet(PRESETS["tiny"]), inputs(PRESETS["tiny"])
    gradients = []
    for half in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            v = net(*x)
        v.float().square().mean().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in net.parameters()]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.99 and not torch.equal(*gradients)


def test_bfloat16_products_on_a_cpu_give_nearly_the_same_gradient(monkeypatch):
    """What training does on a CPU with bfloat16: linear layers and 1x1 convolutions, and nothing else; weights stay float32."""
    torch.manual_seed(0)
    net, x = UNet(PRESETS["tiny"]), inputs(PRESETS["tiny"])
    kinds, gradients = [], []
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    for fast in (False, True):
        monkeypatch.setenv("SNAPGEN_FLOAT32", "" if fast else "1")
        assert student_dtype(torch.device("cpu")) == (torch.bfloat16 if fast else torch.float32)
        multiply_in_bfloat16(net, torch.device("cpu"))
        net.zero_grad()
        v = net(*x)
        v.square().mean().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in net.parameters()]))
        kinds.append({type(layer).__name__ for layer in net.modules() if hasattr(layer, "weight")})
        assert v.dtype == torch.float32 and all(weight.dtype == torch.float32 for weight in net.parameters())
    assert F.cosine_similarity(*gradients, dim=0) > 0.99 and not torch.equal(*gradients)
    assert "Linear" in kinds[0] and "Linear" not in kinds[1] and kinds[1] - kinds[0] == {"Bfloat16Linear", "Bfloat16Pointwise"}
    assert all(type(layer) is torch.nn.Conv2d for layer in net.modules() if getattr(layer, "kernel_size", None) == (3, 3))
    assert UNet(PRESETS["tiny"]).load_state_dict(net.state_dict())


def test_rope_sees_only_relative_positions():
    q, k = torch.randn(64), torch.randn(64)
    cos, sin = rope_table(6, 9, 64)

    def product(query_at, key_at):
        turned = [
            rotate(v.view(1, 1, 1, 64), cos[y * 9 + x][None], sin[y * 9 + x][None])
            for v, (y, x) in ((q, query_at), (k, key_at))
        ]
        return (turned[0] * turned[1]).sum()

    moved = [product((y, x), (y + 2, x + 3)) for y, x in ((0, 0), (3, 1), (2, 5), (3, 5))]
    assert torch.allclose(torch.stack(moved), moved[0].expand(4), atol=1e-4)
    assert (product((0, 0), (2, 3)) - product((0, 0), (3, 2))).abs() > 1e-3  # rows and columns are told apart
    assert (product((0, 0), (2, 3)) - product((0, 0), (2, 4))).abs() > 1e-3


def test_rope_of_a_larger_grid_continues_the_smaller():
    small_cos, large_cos = rope_table(4, 4, 32)[0].view(4, 4, 16), rope_table(8, 6, 32)[0].view(8, 6, 16)
    assert torch.equal(small_cos, large_cos[:4, :4])


@pytest.mark.parametrize("stride", [1, 2])
def test_separable_conv_is_a_grouped_conv_then_a_matrix(stride):
    conv = conv3x3(small(), 6, 10, stride)
    x = torch.randn(2, 6, 8, 8)
    h = F.conv2d(x, conv[0].weight, stride=stride, padding=1, groups=6)
    expected = torch.einsum("oi,bihw->bohw", conv[1].weight[:, :, 0, 0], h) + conv[1].bias[None, :, None, None]
    assert torch.allclose(conv(x), expected, atol=1e-5)


def test_order_in_the_batch_and_padding_do_not_matter():
    cfg = small()
    torch.manual_seed(0)
    net = UNet(cfg).eval()
    x, t, text = inputs(cfg, batch=3)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False], [True, False, False, False, False]])
    with torch.no_grad():
        v = net(x, t, text, mask)
        order = torch.tensor([2, 0, 1])
        assert torch.allclose(net(x[order], t[order], text[order], mask[order]), v[order], atol=1e-5)
        junk = text.clone()
        junk[~mask] = 100.0  # what stands in the padding must not be seen
        assert torch.allclose(net(x, t, junk, mask), v, atol=1e-5)
        longer = torch.cat([text, torch.randn(3, 4, cfg.text_dim)], dim=1)
        longer_mask = torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], dim=1)
        assert torch.allclose(net(x, t, longer, longer_mask), v, atol=1e-5)
        assert not torch.allclose(net(x, t, text), v, atol=1e-3)  # without the mask it is seen


def test_bigger_and_oblong_pictures_work_and_odd_ones_are_refused():
    cfg = small()
    net = UNet(cfg)
    for height, width in ((4, 4), (12, 8), (16, 20)):
        x = torch.randn(1, 4, height, width)
        assert net(x, torch.rand(1), torch.randn(1, 3, 24)).shape == x.shape
    with pytest.raises(ValueError, match="no layer 'up.9'"):
        UNet(small())(*inputs(small(), batch=1), feature="up.9")
    with pytest.raises(ValueError, match="multiples of 4"):
        net(torch.randn(1, 4, 10, 8), torch.rand(1), torch.randn(1, 3, 24))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_are_what_the_layers_give(checkpointing):
    """forward(feature=NAME) returns the velocity of before, and what a hook sees at that layer; its gradient reaches the layer."""
    torch.manual_seed(0)
    net, x = UNet(small()), inputs(small())
    net.checkpointing = checkpointing
    for name, (channels, coarser) in net.features().items():
        seen = []
        hook = net.get_submodule(name).register_forward_hook(lambda module, i, out, seen=seen: seen.append(out.detach()))
        velocity, feature = net(*x, feature=name)
        hook.remove()
        assert torch.equal(feature, seen[0]) and feature.shape == (2, channels, 8 // coarser, 8 // coarser), name
        assert torch.equal(velocity, net(*x))
    feature.square().mean().backward()
    assert net.conv_in.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("step", ["a", "f"])
def test_branches_begin_at_zero_and_learn(step):
    """A ResBlock starts as its shortcut, transformer blocks as the identity; what is zero has a gradient."""
    torch.manual_seed(0)
    net, (x, t, text) = zero_branches(UNet(small(step))), inputs(small(step))
    h, time = torch.randn(2, 96, 2, 2), torch.randn(2, 48)
    block = net.up[0].layers[0]  # a skip of 96 or 64 channels is concatenated
    wide = torch.randn(2, block.resblock.norm1.num_channels, 2, 2)
    assert torch.equal(block.resblock(wide, time), block.resblock.shortcut(wide))
    middle = net.mid[1]
    tokens = h.flatten(2).transpose(1, 2)
    assert torch.equal(middle.blocks[0](tokens, text, None, rope_table(2, 2, 32) if step == "f" else None), tokens)
    (net(x, t, text) - torch.randn_like(x)).square().mean().backward()
    ends = ("conv2.1.weight" if step == "f" else "conv2.weight", "to_out.weight", "ff.proj_out.weight")
    zeros = [name for name, w in net.named_parameters() if not w.any() and w.dim() > 1]
    assert zeros == [name for name, _ in net.named_parameters() if name.endswith(ends)]
    assert all(net.get_parameter(name).grad.any() for name in zeros)


def test_config_refuses_channels_that_do_not_divide():
    with pytest.raises(ValueError, match="multiples"):
        UNetConfig(channels=(40, 64, 96), head_dim=32, groups=16)
    with pytest.raises(ValueError, match="no ladder step"):
        ladder("z")
