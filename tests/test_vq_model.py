"""Laws of the decoupled autoencoder with a codebook: its codes stay through stage 2, stock diffusers finds the same."""

import math
import os
import socket
import subprocess
import sys

import pytest
import torch
from diffusers import VQModel
from models import QUANTIZERS, clusters, make_vq_model, uneven_clusters
from torch.testing import assert_close

from dae_diffusers import DAEVQModel
from dae_diffusers.autoencoders.quantizers import CodebookQuantizer
from dae_diffusers.losses.codebook import (
    codebook_loss,
    codebook_perplexity,
    codebook_usage,
    commitment_loss,
)

LATENT_HALF = {"encoder", "quant_conv", "quantize"}


def train(model, pixel_values, steps=3):
    """Some optimiser steps of the current stage, with weight decay so that any trainable weight moves."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        reconstruction, q = model(pixel_values, return_dict=False)
        loss = (reconstruction - pixel_values).abs().mean()
        if model.stage == 1:
            loss = loss + commitment_loss(q.latents, q.target) + codebook_loss(q.quantized, q.latents)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if model.stage == 1:
            model.quantize.update()


def changed_children(model, before):
    after = model.state_dict()
    return {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_each_stage_changes_its_own_half(quantizer, pixel_values):
    model = make_vq_model(quantizer)
    for stage, expected in ((1, LATENT_HALF | {"auxiliary_decoder"}), (2, {"post_quant_conv", "decoder"})):
        model.set_stage(stage)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        train(model, pixel_values)
        assert changed_children(model, before) == expected - ({"quantize"} if quantizer == "fsq" else set())


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_codes_stay_through_stage_two_and_in_stock_diffusers(quantizer, pixel_values, tmp_path):
    model = make_vq_model(quantizer)
    model.set_stage(1)
    train(model, pixel_values)
    with torch.no_grad():
        codes = model.eval()(pixel_values).quantization.codes
    model.set_stage(2)
    train(model, pixel_values)
    with torch.no_grad():
        assert torch.equal(model(pixel_values).quantization.codes, codes)
        model.eval().to_diffusers().save_pretrained(tmp_path)
        stock = VQModel.from_pretrained(tmp_path)
        latents = stock.encode(pixel_values).latents
        assert torch.equal(stock.quantize(latents)[2][2], codes.flatten())
        assert len(codes.unique()) > 1


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_exported_model_decodes_identically(quantizer, pixel_values, tmp_path):
    model = make_vq_model(quantizer)
    model.set_stage(1)
    train(model, pixel_values)
    model.set_stage(None)
    model.eval().to_diffusers().save_pretrained(tmp_path)
    stock = VQModel.from_pretrained(tmp_path)
    assert not any(name.startswith(("auxiliary", "quantizer")) for name in [*stock.config, *stock.state_dict()])
    with torch.no_grad():
        assert torch.equal(model(pixel_values).sample, stock(pixel_values).sample)
        stored = stock.quantize.embedding.weight
        entries = [m.quantize.get_codebook_entry(torch.arange(4), (1, 2, 2, 3)) for m in (model, stock)]
        assert torch.equal(*entries)
        latents = model.encode(pixel_values).latents
        model.set_stage(2)
        assert_close(model.eval()(pixel_values).sample, stock(pixel_values).sample, rtol=0, atol=1e-5)
    if quantizer.endswith("l2"):
        assert_close(stored.norm(dim=1), torch.ones(16))
        cosine = torch.nn.functional.normalize(latents, dim=1).permute(0, 2, 3, 1) @ stored.T
        assert torch.equal(cosine.argmax(dim=-1).flatten(), stock.quantize(latents)[2][2])


def test_untouched_it_is_its_parent(pixel_values):
    model = make_vq_model("vq", "none").eval()
    with torch.no_grad():
        assert torch.equal(model(pixel_values).sample, model.to_diffusers()(pixel_values).sample)
        latents = model.encode(pixel_values).latents
        _, loss, _ = model.quantize(latents)
        corrected = VQModel(**{k: v for k, v in model.to_diffusers().config.items() if not k.startswith("_")})
        corrected.load_state_dict(model.to_diffusers().state_dict())
        corrected.quantize.legacy = False
        assert_close(loss, corrected.quantize(latents)[1])


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("kind", ["none", "same", "dropout"])
@pytest.mark.parametrize("stage", [1, 2])
def test_every_trainable_parameter_gets_a_gradient(quantizer, kind, stage, pixel_values):
    model = make_vq_model(quantizer, kind).train()
    model.set_stage(stage)
    reconstruction, q = model(pixel_values, return_dict=False)
    (reconstruction.square().mean() + (stage == 1) * codebook_loss(q.quantized, q.latents)).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []
    moved = [model.encoder.conv_in.weight.grad is not None and model.encoder.conv_in.weight.grad.abs().max() > 0]
    assert moved == [stage == 1]


def test_gradient_reaches_the_latents_unchanged():
    quantizer = CodebookQuantizer(8, 3)
    latents = torch.randn(2, 3, 4, 4, requires_grad=True)
    weight = torch.randn(2, 3, 4, 4)
    (quantizer.quantize(latents).straight_through * weight).sum().backward()
    assert torch.equal(latents.grad, weight)


def test_commitment_moves_the_encoder_and_codebook_loss_the_codebook():
    quantizer = CodebookQuantizer(8, 3)
    for loss_of, moves_latents in (
        (lambda q: commitment_loss(q.latents, q.quantized), True),
        (lambda q: codebook_loss(q.quantized, q.latents), False),
    ):
        latents = torch.randn(2, 3, 4, 4, requires_grad=True)
        quantizer.zero_grad()
        loss_of(quantizer.quantize(latents)).backward()
        assert (latents.grad is not None) == moves_latents
        assert (quantizer.embedding.weight.grad is not None) != moves_latents


def test_fsq_is_rounding_in_each_channel():
    levels = (5, 4)
    quantizer = CodebookQuantizer(20, 2, quantizer_type="fsq", fsq_levels=levels)
    latents = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 1.5
    expected = torch.stack(
        [((latents[:, i].clamp(-1, 1) + 1) / 2 * (n - 1)).round() / (n - 1) * 2 - 1 for i, n in enumerate(levels)],
        dim=1,
    )
    q = quantizer.quantize(latents)
    assert_close(q.quantized, expected)
    assert commitment_loss(latents.clamp(-1, 1), q.target) == 0 < commitment_loss(latents, q.target)
    assert list(quantizer.parameters()) == []


def noted_steps(quantizer, batches, per_step):
    quantizer.train()
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        quantizer.note(quantizer.quantize(batch))
        if (number + 1) % per_step == 0:
            quantizer.update()
    return quantizer


def test_kmeans_finds_the_clusters_after_the_warm_up():
    centres, batches = clusters()
    quantizer = CodebookQuantizer(16, 4, quantizer_type="ema", warmup_steps=3)
    noted_steps(quantizer, batches[:2], 1)
    latents = batches[2]
    assert quantizer.is_warming_up and torch.equal(quantizer.quantize(latents).straight_through, latents)
    noted_steps(quantizer, batches[2:3], 1)
    assert not quantizer.is_warming_up
    assert torch.cdist(centres, quantizer.codebook).min(dim=1).values.max() < 0.05


def test_moving_averages_equal_their_formula():
    _, batches = clusters()
    quantizer = CodebookQuantizer(4, 4, quantizer_type="ema", warmup_steps=1, dead_code_threshold=0, ema_decay=0.9)
    noted_steps(quantizer, batches[:1], 1)
    size, total = quantizer.cluster_size.clone(), quantizer.cluster_sum.clone()
    codes = quantizer.codes_of(batches[1]).flatten()
    vectors = batches[1].permute(0, 2, 3, 1).flatten(0, 2)
    noted_steps(quantizer, batches[1:2], 1)
    for k in range(4):
        n, s = (codes == k).sum(), vectors[codes == k].sum(0)
        assert_close(quantizer.codebook[k], (0.9 * total[k] + 0.1 * s) / (0.9 * size[k] + 0.1 * n))


@pytest.mark.parametrize("threshold", [0.0, 0.03])
def test_dead_codes_are_replaced_by_latents(threshold):
    _, batches = clusters(30)
    quantizer = CodebookQuantizer(
        4, 4, quantizer_type="ema", warmup_steps=1, dead_code_threshold=threshold, ema_decay=0.5
    )
    noted_steps(quantizer, batches[:1], 1)
    far = torch.full((4,), 100.0)
    quantizer.embedding.weight[2] = far
    quantizer.cluster_sum[2] = far * quantizer.cluster_size[2]
    noted_steps(quantizer, batches[1:], 1)
    counts = torch.bincount(torch.cat([quantizer.codes_of(b).flatten() for b in batches]), minlength=4)
    assert (codebook_usage(counts) == 1.0) == (threshold > 0)
    assert torch.equal(quantizer.codebook[2], far) == (threshold == 0)


def test_accumulated_micro_batches_equal_one_large_batch():
    _, batches = clusters(8)
    options = {"quantizer_type": "ema", "warmup_steps": 1, "l2_normalize": True}
    torch.manual_seed(0)
    halves = CodebookQuantizer(64, 4, **options)
    torch.manual_seed(0)
    whole = CodebookQuantizer(64, 4, **options)
    whole.load_state_dict(halves.state_dict())
    for quantizer in (halves, whole):  # past k-means, whose draws depend on how the latents came
        quantizer.num_updates.fill_(1)
        quantizer.dead_code_threshold = 0
    noted_steps(halves, batches, 2)
    pairs = [torch.cat(batches[n : n + 2]) for n in range(0, 8, 2)]
    noted_steps(whole, pairs, 1)
    assert_close(halves.codebook, whole.codebook, rtol=1e-5, atol=1e-6)
    assert_close(halves.cluster_size, whole.cluster_size)


def test_micro_batches_of_several_shapes_equal_one_large_batch():
    """As with aspect buckets, and fewer latents than codes."""
    parts, whole = (CodebookQuantizer(200, 4, quantizer_type="ema", warmup_steps=9) for _ in range(2))
    batches = uneven_clusters(3)
    noted_steps(parts, batches, 3)
    noted_steps(whole, [torch.cat(batches, dim=2)], 1)
    assert parts.num_recent == whole.num_recent == 64 + 56 + 48
    assert_close(*(quantizer.recent.sort(dim=0).values for quantizer in (parts, whole)))


RANKS = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
from models import uneven_clusters
from dae_diffusers.autoencoders.quantizers import CodebookQuantizer
dist.init_process_group("gloo")
rank = dist.get_rank()
batches = uneven_clusters()
torch.manual_seed(0)
quantizer = CodebookQuantizer(50, 4, quantizer_type="ema", warmup_steps=2, l2_normalize=True, ema_decay=0.5).train()
for number in range(rank, 12, 2):
    torch.manual_seed(number)
    quantizer.note(quantizer.quantize(batches[number]))
    quantizer.update()
torch.save(quantizer.state_dict(), f"{folder}/{{rank}}.pt")
dist.destroy_process_group()
"""


def test_two_processes_equal_one_that_accumulates(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(tests=os.path.dirname(__file__), folder=tmp_path))
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    processes = [subprocess.Popen([sys.executable, script], env={**environment, "RANK": rank}) for rank in "01"]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    torch.manual_seed(0)
    one = CodebookQuantizer(50, 4, quantizer_type="ema", warmup_steps=2, l2_normalize=True, ema_decay=0.5)
    noted_steps(one, uneven_clusters(), 2)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in "01"]
    for name, value in one.state_dict().items():
        assert torch.equal(states[0][name], states[1][name]), name
        assert_close(states[0][name], value, rtol=1e-5, atol=1e-6)


def test_usage_and_perplexity_equal_their_formulas():
    counts = torch.tensor([8, 8, 0, 0])
    assert codebook_usage(counts) == 0.5
    assert math.isclose(codebook_perplexity(counts), 2.0)
    assert math.isclose(codebook_perplexity(torch.ones(7)), 7.0)
    counts = torch.tensor([5, 3, 1, 0])
    p = [5 / 9, 3 / 9, 1 / 9]
    assert math.isclose(codebook_perplexity(counts), math.exp(-sum(x * math.log(x) for x in p)))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_save_and_load_keep_everything(quantizer, tmp_path, pixel_values):
    model = make_vq_model(quantizer)
    model.set_stage(1)
    train(model, pixel_values)
    model.save_pretrained(tmp_path)
    loaded = DAEVQModel.from_pretrained(tmp_path)
    assert loaded.config.quantizer_type == model.config.quantizer_type
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_codes_may_have_fewer_dimensions_than_the_decoder_takes(pixel_values):
    model = make_vq_model("ema_l2", "same", vq_embed_dim=2, latent_channels=6)
    model.set_stage(1)
    assert model(pixel_values).quantization.latents.shape == (2, 2, 8, 8)
    model.eval().start_decoder_from_auxiliary()
    latents = torch.randn(2, 2, 8, 8)
    from_auxiliary = model.decode_in_stage(latents)
    model.set_stage(None)
    assert_close(model.decode(latents).sample, from_auxiliary)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantizer_type": "lfq"}, "must be one of"),
        ({"quantizer_type": "fsq"}, "give levels with 'fsq'"),
        ({"quantizer_fsq_levels": (4, 4)}, "give levels with 'fsq'"),
        ({"quantizer_type": "fsq", "quantizer_fsq_levels": (4, 4, 4)}, "64 codes of dimension 3"),
        ({"quantizer_type": "fsq", "quantizer_fsq_levels": (16, 1, 1)}, "at least 2"),
        ({"quantizer_type": "fsq", "quantizer_fsq_levels": (4, 4, 1), "quantizer_l2_normalize": True}, "fixed grid"),
        ({"quantizer_type": "ema", "quantizer_ema_decay": 1.0}, "below 1"),
        ({"quantizer_type": "ema", "quantizer_warmup_steps": 0}, "at least 1"),
        ({"quantizer_type": "ema", "quantizer_dead_code_threshold": 1.0}, "below 1"),
        ({"num_vq_embeddings": 1}, "at least 2"),
        ({"norm_type": "spatial"}, "group"),
    ],
)
def test_bad_quantizers_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make_vq_model("vq", **config)
