import ast
import copy
import sys

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch.testing import assert_close

from dae_diffusers import DAEDiTTransformer2DModel, transformer_dae_dit
from dae_diffusers.transformer_dae_dit import DIT_SIZES, _position_tables, _rms_norm, _rotate


def make_transformer(trained: bool = True, **config) -> DAEDiTTransformer2DModel:
    """A tiny transformer; `trained` fills the layers that start at zero, so that every part has its say."""
    torch.manual_seed(0)
    defaults = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 3}
    transformer = DAEDiTTransformer2DModel(**{**defaults, **config})
    if trained:
        for module in (transformer.modulation, transformer.proj_out):
            torch.nn.init.normal_(module.weight, std=0.2)
            torch.nn.init.normal_(module.bias, std=0.2)
    return transformer


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(3, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([10.0, 500.0, 999.5]),
        "class_labels": torch.tensor([0, 2, 1]),
    }


def test_new_model_predicts_zero_and_its_blocks_are_the_identity(inputs):
    transformer = make_transformer(trained=False)
    unchanged = []
    for block in transformer.transformer_blocks:
        block.register_forward_hook(lambda block, args, output: unchanged.append(torch.equal(args[0], output)))
    sample = transformer(**inputs).sample
    assert unchanged == [True, True]
    assert sample.shape == inputs["hidden_states"].shape
    assert not sample.any()


def test_a_new_model_tells_classes_and_noise_levels_apart():
    """As well as it could: what it adds for them differs by about as much as for any other pair. Small beginnings are learnt late."""
    torch.manual_seed(0)
    model = DAEDiTTransformer2DModel(
        num_layers=1, num_attention_heads=2, num_classes=10, num_attribute_classes=[10], num_continuous=1
    )
    numbers = torch.linspace(-2, 2, 10)
    parts = {
        "classes": model.label_embed.weight[:-1],
        "attributes": model.attribute_embeds[0].weight[:-1],
        "numbers": model.continuous_embeds[0](numbers, torch.float32),
        "noise levels": model.time_embed(model.time_proj(torch.linspace(1, 1000, 10))),
    }
    for name, vectors in parts.items():
        assert 0.1 < (vectors - vectors.mean(0)).square().mean().sqrt() < 2, name


def slow_attention(attn: torch.nn.Module, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Attention of one sample, `(N, dim)`, a head and a pair of channels at a time."""
    heads, head_dim, num_pairs = attn.heads, attn.head_dim, attn.head_dim // 2
    query, key, value = attn.qkv_proj(tokens).view(len(tokens), 3, heads, head_dim).unbind(1)
    rotation = torch.zeros(len(tokens), head_dim, head_dim)
    for token in range(len(tokens)):
        row_and_column = divmod(token, grid[1])
        for pair in range(num_pairs):
            frequency = 100 ** (-(pair % (num_pairs // 2)) / (num_pairs // 2))
            angle = torch.tensor(row_and_column[pair >= num_pairs // 2] * frequency)
            turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos())).view(2, 2)
            rotation[token, 2 * pair : 2 * pair + 2, 2 * pair : 2 * pair + 2] = turn
    outputs = []
    for head in range(heads):
        q, k = (torch.einsum("nij,nj->ni", rotation, _rms_norm(states[:, head])) for states in (query, key))
        outputs.append((q @ k.T / head_dim**0.5).softmax(-1) @ value[:, head])
    return attn.out_proj(torch.cat(outputs, dim=-1))


def test_prediction_equals_its_formula_written_the_slow_way():
    transformer = make_transformer(sample_size=(4, 6))
    latents, timestep, label = torch.randn(1, 4, 4, 6), torch.tensor([300.0]), torch.tensor([2])
    patches = latents.view(4, 2, 2, 3, 2).permute(1, 3, 0, 2, 4).reshape(6, 16)
    tokens = transformer.patch_embed(patches) + _position_tables(2, 3, 16, 8, torch.device("cpu"))[0]
    conditioning = transformer.time_embed(transformer.time_proj(timestep)) + transformer.label_embed(label)
    chunks = iter(transformer.modulation(conditioning.sigmoid() * conditioning).view(-1, 16))
    for block in transformer.transformer_blocks:
        shifts, scales, gates = ([next(chunks), next(chunks)] for _ in range(3))
        attended = slow_attention(block.attn, _rms_norm(tokens) * (1 + scales[0]) + shifts[0], (2, 3))
        tokens = tokens + gates[0] * attended
        gate, up = block.ff.gate_up_proj(_rms_norm(tokens) * (1 + scales[1]) + shifts[1]).chunk(2, dim=-1)
        tokens = tokens + gates[1] * block.ff.down_proj(gate.sigmoid() * gate * up)
    shift, scale = chunks
    patches = transformer.proj_out(_rms_norm(tokens) * (1 + scale) + shift)
    expected = patches.view(2, 3, 4, 2, 2).permute(2, 0, 3, 1, 4).reshape(1, 4, 4, 6)
    assert_close(transformer(latents, timestep, label).sample, expected, atol=1e-5, rtol=1e-4)


def test_every_parameter_learns(inputs):
    transformer = make_transformer()
    transformer(**inputs).sample.square().mean().backward()
    assert [name for name, parameter in transformer.named_parameters() if not parameter.grad.any()] == []


def test_patch_of_the_output_stands_where_its_patch_of_the_input_stood(inputs):
    transformer = make_transformer(trained=False)
    torch.nn.init.normal_(transformer.proj_out.weight)  # the blocks stay the identity: tokens do not mix
    changed = inputs["hidden_states"].clone()
    changed[:, :, 2:4, 6:8] += 1
    difference = transformer(**inputs).sample - transformer(**{**inputs, "hidden_states": changed}).sample
    assert difference[:, :, 2:4, 6:8].abs().min() > 0
    difference[:, :, 2:4, 6:8] = 0
    assert_close(difference, torch.zeros_like(difference), atol=1e-6, rtol=0)


def test_samples_of_a_batch_do_not_see_each_other(inputs):
    transformer = make_transformer()
    together = transformer(**inputs).sample
    alone = [transformer(**{name: value[n : n + 1] for name, value in inputs.items()}).sample for n in range(3)]
    assert_close(torch.cat(alone), together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(8, 12), (2, 16), (14, 10)])
def test_any_multiple_of_the_patch_size_is_a_size(inputs, size):
    hidden_states = torch.randn(3, 4, *size)
    assert make_transformer()(**{**inputs, "hidden_states": hidden_states}).sample.shape == (3, 4, *size)


def test_rows_and_columns_are_told_apart(inputs):
    transformer = make_transformer(patch_size=1)
    hidden_states = inputs["hidden_states"]
    upright = transformer(**inputs).sample
    turned = transformer(**{**inputs, "hidden_states": hidden_states.transpose(2, 3)}).sample.transpose(2, 3)
    assert (upright - turned).abs().max() > 0.01


def test_token_has_the_same_position_in_every_grid():
    small = [table.unflatten(0, (3, 5)) for table in _position_tables(3, 5, 32, 8, torch.device("cpu"))]
    large = [table.unflatten(0, (7, 6)) for table in _position_tables(7, 6, 32, 8, torch.device("cpu"))]
    assert all(torch.equal(one, other[:3, :5]) for one, other in zip(small, large, strict=True))
    assert len(small[0].flatten(0, 1).unique(dim=0)) == 15


@pytest.mark.parametrize("head_dim", [8, 64, 72])
def test_rotated_scores_depend_on_the_offset_alone(head_dim):
    rotary = _position_tables(6, 6, 4 * head_dim, head_dim, torch.device("cpu"))[1]
    query, key = torch.randn(2, head_dim)
    queries, keys = (_rotate(vector.expand(1, 36, 1, head_dim), rotary).view(6, 6, head_dim) for vector in (query, key))
    score = (queries[2, 3] * keys[4, 1]).sum()
    assert_close((queries[:4, 2:] * keys[2:, :4]).sum(-1), score.expand(4, 4), atol=1e-4, rtol=1e-4)
    assert (score - (queries[2, 3] * keys[1, 4]).sum()).abs() > 1e-3
    assert_close(queries.norm(dim=-1), query.norm().expand(6, 6))


def test_rms_norm_equals_its_formula():
    hidden_states = torch.randn(2, 3, 8) * 5
    assert_close(_rms_norm(hidden_states), hidden_states / (hidden_states**2).mean(-1, keepdim=True).sqrt())


def test_gradient_checkpointing_changes_nothing(inputs):
    plain, checkpointed = make_transformer(), make_transformer()
    checkpointed.enable_gradient_checkpointing()
    samples = [transformer(**inputs).sample for transformer in (plain, checkpointed)]
    assert torch.equal(*samples)
    for sample in samples:
        sample.square().mean().backward()
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("config", [{}, {"sample_size": [8, 12], "out_channels": 8, "num_classes": None}])
def test_saved_model_returns_bit_equal(inputs, tmp_path, config):
    transformer = make_transformer(**config)
    transformer.save_pretrained(tmp_path)
    loaded = DAEDiTTransformer2DModel.from_pretrained(tmp_path)
    for name in [name for name in transformer.config if not name.startswith("_")]:
        assert loaded.config[name] == transformer.config[name]
    if config:
        inputs.pop("class_labels")
    assert torch.equal(loaded(**inputs).sample, transformer(**inputs).sample)
    assert set(transformer.state_dict()) == {name for name, _ in transformer.named_parameters()}


def test_no_label_is_the_null_class(inputs):
    transformer = make_transformer()
    labels = inputs.pop("class_labels")
    assert transformer.null_class == 3
    without = transformer(**inputs).sample
    assert torch.equal(without, transformer(**inputs, class_labels=torch.full((3,), 3)).sample)
    assert (without - transformer(**inputs, class_labels=labels).sample).abs().amax((1, 2, 3)).min() > 1e-3


def test_training_mode_drops_no_labels(inputs):
    transformer = make_transformer()
    assert torch.equal(transformer.train()(**inputs).sample, transformer.eval()(**inputs).sample)


def test_unconditional_model_knows_no_labels(inputs):
    transformer = make_transformer(num_classes=None)
    labels = inputs.pop("class_labels")
    assert transformer.null_class is None
    assert transformer(**inputs).sample.shape == (3, 4, 8, 8)
    with pytest.raises(ValueError, match="unconditional"):
        transformer(**inputs, class_labels=labels)


def test_scalar_timestep_counts_for_all_samples(inputs):
    transformer = make_transformer()
    inputs["timestep"] = torch.full((3,), 250.0)
    expected = transformer(**inputs).sample
    for timestep in (torch.tensor(250.0), torch.tensor([250.0]), torch.tensor(250)):
        assert torch.equal(transformer(**{**inputs, "timestep": timestep}).sample, expected)


def test_tuple_is_returned_when_asked_for(inputs):
    transformer = make_transformer()
    assert torch.equal(transformer(**inputs, return_dict=False)[0], transformer(**inputs).sample)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(3, 5, 8, 8)}, r"\(3, 5, 8, 8\), but must be \(B, 4, h, w\)"),
        ({"hidden_states": torch.zeros(4, 8, 8)}, r"must be \(B, 4, h, w\)"),
        ({"hidden_states": torch.zeros(3, 4, 8, 9)}, "nearest size is 8 x 8"),
        ({"timestep": torch.zeros(2)}, r"must be \(3,\)"),
        ({"class_labels": torch.zeros(2, dtype=torch.long)}, "3 integers"),
        ({"class_labels": torch.zeros(3)}, "3 integers"),
    ],
)
def test_bad_input_is_named(inputs, change, message):
    with pytest.raises(ValueError, match=message):
        make_transformer()(**{**inputs, **change})


@pytest.mark.parametrize(
    ("config", "message"),
    [({"attention_head_dim": 6}, "Use 8"), ({"sample_size": 9}, r"Use \[10, 10\]"), ({"sample_size": (8, 7)}, "8, 8")],
)
def test_impossible_config_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        make_transformer(**config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(inputs, dtype):
    transformer = make_transformer()
    expected = transformer(**inputs).sample
    inputs["hidden_states"] = inputs["hidden_states"].to(dtype)
    sample = transformer.to(dtype)(**inputs).sample
    assert sample.dtype == dtype
    assert_close(sample.float(), expected, atol=0.05 * expected.abs().max().item(), rtol=0)


def test_autocast_keeps_the_residual_stream_in_float32(inputs):
    transformer = make_transformer()
    expected = transformer(**inputs).sample
    dtypes = []
    for block in transformer.transformer_blocks:
        block.register_forward_hook(lambda block, args, output: dtypes.extend(x.dtype for x in (*args[:4], output)))
    with torch.autocast("cpu", torch.bfloat16):
        sample = transformer(**inputs).sample
    sample.float().square().mean().backward()
    assert dtypes == [torch.float32] * 10  # tokens, shift, scale, gate, and tokens again
    assert all(parameter.grad.dtype == torch.float32 for parameter in transformer.parameters())
    assert_close(sample.float(), expected, atol=0.05 * expected.abs().max().item(), rtol=0)


def test_attention_in_bfloat16_trains_on_a_cpu_as_the_fused_kernel_would(inputs, monkeypatch):
    """It takes another way there, which is several times faster."""
    plain, calls = transformer_dae_dit._attention, []
    monkeypatch.setattr(transformer_dae_dit, "_attention", lambda *args: calls.append(1) or plain(*args))

    def gradients(few_tokens: int) -> list[torch.Tensor]:
        monkeypatch.setattr(transformer_dae_dit, "_FEW_TOKENS", few_tokens)
        transformer = make_transformer()
        with torch.autocast("cpu", torch.bfloat16):
            transformer(**inputs).sample.float().square().mean().backward()
        return [parameter.grad for parameter in transformer.parameters()]

    fused, found = gradients(0), gradients(512)
    assert len(calls) == 2  # the two blocks of the second transformer
    for first, second in zip(fused, found, strict=True):
        assert_close(first, second, atol=0.03 * first.abs().max().item(), rtol=0)
    transformer = make_transformer()
    transformer(**inputs)
    transformer.set_attention_backend("native")
    with torch.autocast("cpu", torch.bfloat16):
        transformer(**inputs)
    transformer.reset_attention_backend()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        transformer(**inputs)
    assert len(calls) == 2  # neither in float32, nor where a backend was chosen, nor without gradients


def test_training_may_follow_sampling(inputs):
    transformer = make_transformer()
    inputs["hidden_states"] = torch.randn(3, 4, 6, 10)  # a size that no other test has cached
    with torch.inference_mode():
        transformer(**inputs)
    transformer(**inputs).sample.mean().backward()


def test_attention_backend_can_be_chosen(inputs):
    transformer = make_transformer()
    expected = transformer(**inputs).sample
    with attention_backend():  # `set_attention_backend` sets the process's default as well: this puts it back
        transformer.set_attention_backend("_native_math")
        assert_close(transformer(**inputs).sample, expected, atol=1e-5, rtol=1e-5)
        transformer.set_attention_backend("_native_cudnn")
        with attention_backend(), pytest.raises(RuntimeError, match="No viable backend"):
            transformer(**inputs)  # on a CPU: so the model's own choice is heard
    assert list(transformer.attn_processors) == [f"transformer_blocks.{n}.attn.processor" for n in range(2)]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of dynamo's own
def test_compiled_blocks_agree_and_compile_once(fresh_compiler, inputs):
    transformer = make_transformer()
    compiled = copy.deepcopy(transformer)
    compiled.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            expected, sample = transformer(**inputs).sample, compiled(**inputs).sample
            assert_close(sample, expected, atol=1e-5, rtol=1e-5)
            expected.mean().backward()
            sample.mean().backward()
            inputs["hidden_states"] = inputs["hidden_states"].roll(1, dims=0)
    for one, other in zip(transformer.parameters(), compiled.parameters(), strict=True):
        assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", DIT_SIZES)
def test_named_size_gives_its_architecture(size):
    num_layers, dim, heads = DIT_SIZES[size]
    kwargs = DAEDiTTransformer2DModel.size_kwargs(f"{size}/4")
    with torch.device("meta"):
        transformer = DAEDiTTransformer2DModel(sample_size=32, **kwargs)
    assert transformer.config.patch_size == 4
    assert len(transformer.transformer_blocks) == num_layers
    assert transformer.patch_embed.out_features == dim
    block = transformer.transformer_blocks[0]
    assert block.attn.heads == heads
    plain_mlp = 8 * dim * dim
    assert plain_mlp <= sum(weight.numel() for weight in block.ff.parameters()) <= plain_mlp + 96 * dim


@pytest.mark.parametrize("name", ["DiT-M/2", "DiT-S", "DiT-S/0", "DiT-S/two", "dit-s/2", ""])
def test_unknown_size_lists_what_exists(name):
    with pytest.raises(ValueError, match="DiT-Ti, DiT-XS, DiT-S, DiT-B, DiT-L, DiT-XL"):
        DAEDiTTransformer2DModel.size_kwargs(name)


def test_module_needs_torch_and_diffusers_alone():
    with open(transformer_dae_dit.__file__, encoding="utf-8") as file:
        nodes = [node for node in ast.walk(ast.parse(file.read())) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {alias.name if isinstance(node, ast.Import) else node.module for node in nodes for alias in node.names}
    assert {module.partition(".")[0] for module in modules} - sys.stdlib_module_names == {"torch", "diffusers"}
    assert hasattr(transformer_dae_dit, "ModelMixin")
