"""Laws of the optimiser that orthogonalises its updates."""

import copy

import pytest
import torch
from models import make_plain_vq_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dae_diffusers import DAEDiTTransformer2DModel
from dae_diffusers.engine import muon as muon_module
from dae_diffusers.engine.muon import MuonWithAdamW, hidden_matrices, orthogonalized
from dae_diffusers.engine.optimization import make_optimizer
from dae_diffusers.engine.settings import OptimizationConfig
from dae_diffusers.errors import ConfigError

OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "fused": True}


def stepped(optimizers: list[torch.optim.Optimizer], weights: list[nn.Parameter], gradients: list[list]) -> list:
    for given in gradients:
        for weight, gradient in zip(weights, given, strict=True):
            weight.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    return [weight.detach().clone() for weight in weights]


def copies(weights: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(weight.detach().clone()) for weight in weights]


def draws(weights: list[nn.Parameter], count: int) -> list[list[torch.Tensor]]:
    return [[torch.randn_like(weight) for weight in weights] for _ in range(count)]


@pytest.fixture
def weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(*shape)) for shape in ((24, 8), (8, 16), (24, 8), (8,))]


@pytest.mark.parametrize("has_bf16", [True, False])
def test_updates_equal_those_of_torch(weights, has_bf16, monkeypatch):
    """Of single matrices, of a product that holds three of them, and of the weights that are left to AdamW."""
    monkeypatch.setattr(muon_module, "multiplies_in_bfloat16", lambda device: has_bf16)
    gradients = draws(weights, 4)
    plain, fused, other = copies(weights), copies(weights), copies(weights)
    ours = MuonWithAdamW({fused[0]: 3, fused[1]: 1, fused[2]: 1}, [fused[3]], **OPTIONS)
    found = stepped([ours], fused, gradients)

    muon = {"lr": 0.01, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    expected = stepped(
        [torch.optim.Muon(plain[1:3], **muon), torch.optim.AdamW(plain[3:], **OPTIONS)], plain, gradients
    )
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert torch.allclose(mine, theirs, atol=1e-3)  # products of bfloat16 in another order
    assert torch.equal(found[3], expected[3])

    parts = [nn.Parameter(part.clone()) for part in other[0].detach().chunk(3)]
    expected = stepped([torch.optim.Muon(parts, **muon)], parts, [list(given[0].chunk(3)) for given in gradients])
    assert torch.allclose(found[0], torch.cat(expected), atol=1e-3)
    assert not torch.allclose(found[0], stepped([torch.optim.Muon(other[:1], **muon)], other, gradients)[0], atol=1e-3)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_orthogonalised_matrices_have_singular_values_near_one(has_bf16, monkeypatch):
    monkeypatch.setattr(muon_module, "multiplies_in_bfloat16", lambda device: has_bf16)
    assert orthogonalized(torch.randn(1, 3, 4)).dtype == (torch.bfloat16 if has_bf16 else torch.float32)
    values = torch.linalg.svdvals(orthogonalized(torch.randn(2, 12, 30)).float())
    assert 0.6 < values.min() and values.max() < 1.3
    assert not orthogonalized(torch.zeros(1, 3, 4)).any()


def test_optimizer_goes_on_from_its_state(weights):
    gradients = draws(weights, 4)
    whole, halves = copies(weights), copies(weights)

    def make(given):
        return MuonWithAdamW({given[0]: 3, given[1]: 1}, given[2:], **OPTIONS)

    expected = stepped([make(whole)], whole, gradients)
    first = make(halves)
    stepped([first], halves, gradients[:2])
    second = make(halves)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for mine, theirs in zip(stepped([second], halves, gradients[2:]), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_matrices_inside_blocks_are_found():
    model = DAEDiTTransformer2DModel(
        sample_size=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=3, cross_attention_dim=8
    )
    found = hidden_matrices(model)
    names = {name: found[weight] for name, weight in model.named_parameters() if weight in found}
    block = {"attn.qkv_proj": 3, "attn.out_proj": 1, "ff.gate_up_proj": 2, "ff.down_proj": 1}
    block |= {"cross_attn.q_proj": 1, "cross_attn.kv_proj": 2, "cross_attn.out_proj": 1}
    assert names == {
        f"transformer_blocks.{n}.{layer}.weight": parts for n in range(2) for layer, parts in block.items()
    }
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    assert len(hidden_matrices(LlamaForCausalLM(LlamaConfig(vocab_size=7, **sizes)))) == 7


def test_model_without_blocks_is_refused():
    config = OptimizationConfig(optimizer="muon")
    with pytest.raises(ConfigError, match=r"`optimizer muon` trains the matrices .* VQModel has none: leave it out"):
        make_optimizer(config, [make_plain_vq_model()], torch.device("cpu"))
