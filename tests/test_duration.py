"""What takes long is said before it is over."""

import tempfile
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from models import make_plain_vq_model, save_autoencoder
from safetensors.torch import load_file
from scripts import TINY_DAE, TINY_DIT, TINY_PRIOR, TRANSFORMER, resume, run

from dae_diffusers import duration as module
from dae_diffusers.duration import Forecast, duration, pace
from dae_diffusers.engine.checkpointing import Checkpointer, find_checkpoints
from dae_diffusers.engine.dry_run import DryRun, gain_of_compiling, gain_of_precision
from dae_diffusers.engine.optimization import make_lr_scheduler
from dae_diffusers.engine.precision import computing_in_other_precision, faster_precision
from dae_diffusers.engine.settings import OptimizationConfig
from dae_diffusers.training import train_dae, train_dit, train_vqgan_prior


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 second"),
        (40, "40 seconds"),
        (900, "15 minutes"),
        (5400, "1.5 hours"),
        (54000, "15 hours"),
        (7e5, "8.1 days"),
    ],
)
def test_durations_are_round_words(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(("steps", "hours"), [(10_001, True), (100, False)])
def test_pace_is_said_once_and_how_to_stop_if_hours_are_left(monkeypatch, steps, hours):
    now = iter(range(0, 10**6, 4))  # four seconds a step
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    forecast = Forecast(steps, 8, 80, long_advice="Compile.")
    said = [text for text in map(forecast.after, range(1, 40)) if text]
    assert len(said) == 1 and "at 4 seconds a step, 2 images a second" in said[0]
    assert ("over the images. Compile. Ctrl-C saves" in said[0]) == hours
    expected = (
        "the 9,995 steps that are left take about 11 hours" if hours else "the 94 steps that are left take about 6"
    )
    assert said[0].startswith(expected) and f"{'1e+03' if hours else '9.4'} passes" in said[0]


@pytest.mark.parametrize(
    ("precision", "has_units", "words"),
    [
        ("no", True, "`--mixed_precision bf16`"),
        ("bf16", True, ""),
        ("no", False, ""),
        ("bf16", False, "`--mixed_precision no` is much faster"),
    ],
)
def test_faster_precision_is_named_where_the_processor_has_it(monkeypatch, precision, has_units, words):
    set_matrix_units(monkeypatch, has_units)
    advice = faster_precision(Accelerator(cpu=True, mixed_precision=precision))
    assert (advice or "").startswith(words) and bool(advice) == bool(words)
    now = iter(range(0, 10**6, 30))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    said = list(filter(None, map(Forecast(100, 8, 80, advice).after, range(1, 40))))
    assert len(said) == 1 and said[0].endswith(f"passes over the images.{advice and ' ' + advice or ''}")


def test_products_of_vectors_in_bfloat16_are_to_be_measured(monkeypatch):
    set_matrix_units(monkeypatch, False, has_products=True)
    assert "can be twice as fast on this processor" in faster_precision(Accelerator(cpu=True, mixed_precision="no"))


def test_pace_of_a_stream_of_unknown_length():
    assert pace(10, 0.5, 4, None) == "5 seconds, at 0.5 seconds a step, 8 images a second"


def set_matrix_units(monkeypatch, has_units: bool, has_products: bool = False) -> None:
    """Lets the processor multiply in bfloat16, or not: with units for matrices, or with products of vectors alone."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_units)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_units or has_products)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_units)


def contents(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_dry_run_measures_each_stage_and_keeps_nothing(image_folder, tmp_path, capsys, monkeypatch):
    """In an output folder that another run has, with flags that would upload, track and resume."""
    vae, vq, finished = save_autoencoder(tmp_path / "vae"), tmp_path / "vq", tmp_path / "finished"
    make_plain_vq_model().save_pretrained(vq)
    (finished / "train_dae").mkdir(parents=True)
    (finished / "train_dae" / "log.jsonl").write_text('{"step": 1}\n')
    temporary = Path(tempfile.gettempdir())
    before, left = contents(tmp_path), set(temporary.glob("dry-run-*"))
    options = {"train_data_dir": image_folder, "output_dir": finished}
    dae = " --dry_run --validation_steps 1 --report_to tensorboard --push_to_hub --resume_from_checkpoint latest"
    weighed, save = [], Checkpointer.save  # bytes of each checkpoint of a run
    set_matrix_units(monkeypatch, False)

    def save_and_weigh(checkpointer, step, **state) -> None:
        save(checkpointer, step, **state)
        newest = find_checkpoints(checkpointer.folder)[-1]
        weighed.append(sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()))

    monkeypatch.setattr(Checkpointer, "save", save_and_weigh)
    runs = [
        (train_dae, TINY_DAE + dae, {}, ("Stage 1", "Stage 2")),
        (train_dae, TINY_DAE + " --dry_run --stage 1 --stage1_steps 1 --mixed_precision bf16", {}, ("Stage 1",)),
        (train_dit, TINY_DIT + " --dry_run", {"vae": vae}, ("DiT",)),
        (train_vqgan_prior, TINY_PRIOR + " --dry_run", {"vae": vq}, ("Prior",)),
    ]
    for script, flags, more, stages in runs:
        weighed.clear()
        run(script, flags, **options, **more)
        lines = capsys.readouterr().out.splitlines()
        names = [line[2:14].strip() for line in lines[1:]]
        all_stages = ["all stages"] if len(stages) > 1 else []
        other = ["float32", "faster"] if "bf16" in flags else []  # one step is too few to measure another precision
        assert names == ["parameters", *stages, *all_stages, *other, "memory", "disk"], lines
        total = {train_dae: 4, train_dit: 6, train_vqgan_prior: 6}[script] if len(stages) > 1 or more else 1
        assert f"{total} steps: 1 second" in lines[2] and "passes over the images" in lines[2]
        assert lines[-1][14:].startswith(f"checkpoints of {max(weighed) / 2**20:,.1f} MiB, ")
    assert contents(tmp_path) == before
    assert set(temporary.glob("dry-run-*")) == left


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of the tracer
def test_dry_run_measures_with_and_without_compiling(image_folder, tmp_path, capsys, monkeypatch, fresh_compiler):
    """Steps before the networks are compiled, and after; only the latter give the time of the run."""
    compiled, compile_module = [], torch.nn.Module.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend=backend))
    vae, more = save_autoencoder(tmp_path / "vae"), " --dry_run --compile --max_train_steps "
    seen, has_seen_step = [], DryRun.has_seen_step
    monkeypatch.setattr(DryRun, "has_seen_step", lambda dry_run: seen.append(len(compiled)) or has_seen_step(dry_run))
    for steps, taken, has_units in ((19, 19, True), (9, 9, False), (8, 4, False)):
        set_matrix_units(monkeypatch, has_units)
        seen.clear(), compiled.clear(), torch.compiler.reset()
        run(train_dit, TINY_DIT + more + str(steps), train_data_dir=image_folder, output_dir=tmp_path / "run", vae=vae)
        rows = {line[2:14].strip(): line[14:] for line in capsys.readouterr().out.splitlines()[1:]}
        assert (" instead of " in rows["compiled"]) != ("too short" in rows["compiled"]) == (steps == 8)
        assert not any(seen[:4]) and len(seen) == taken and all(seen[4:])  # graphs that are compiled
        assert ("bfloat16" in rows) == has_units and (taken < 19 or seen[9] > seen[8])  # for bfloat16 once more


PRECISIONS = ("bfloat16", torch.bfloat16), ("float32", torch.float32)


def prepared(precision: str):
    """An accelerator, a model that it has prepared, and one call of the model."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    torch.manual_seed(0)
    model = accelerator.prepare(torch.nn.Linear(32, 8))
    images = torch.randn(4, 32)

    def call():
        with accelerator.autocast():
            frozen = torch.nn.functional.linear(images, model.weight)
        return model(images), frozen

    return accelerator, model, call


@pytest.mark.parametrize(("precision", "other"), [("no", "bf16"), ("bf16", "no")])
def test_other_precision_computes_as_a_run_of_that_precision(precision, other):
    """Bit for bit, and not a step longer."""
    expected, before = prepared(other)[2](), prepared(precision)[2]()
    accelerator, model, call = prepared(precision)
    with computing_in_other_precision(accelerator, [model]):
        found = call()
    for result, same, unlike in zip(found, expected, before, strict=True):
        assert torch.equal(result, same) and result.dtype == same.dtype and not torch.equal(result, unlike)
    assert found[0].dtype == torch.float32  # losses are computed from it
    assert all(map(torch.equal, call(), before))


@pytest.mark.parametrize(("precision", "num_steps"), [("no", 12), ("no", 11), ("bf16", 12)])
def test_dry_run_measures_the_other_precision(image_folder, tmp_path, capsys, monkeypatch, precision, num_steps):
    """Four steps of networks that compute in the run's precision, then eight in the other and in that by turns."""
    set_matrix_units(monkeypatch, True)
    computed, seen, has_seen_step = set(), [], DryRun.has_seen_step

    def note(module, inputs, output) -> None:
        if type(module) in (torch.nn.Linear, torch.nn.Conv2d):
            computed.add((type(module), output.dtype))

    def see(dry_run) -> bool:
        seen.append(computed.copy()), computed.clear()
        return has_seen_step(dry_run)

    monkeypatch.setattr(DryRun, "has_seen_step", see)
    flags = f"{TINY_DIT} --dry_run --mixed_precision {precision} --max_train_steps {num_steps}"
    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        vae = save_autoencoder(tmp_path / "vae")
        run(train_dit, flags, train_data_dir=image_folder, output_dir=tmp_path / "run", vae=vae)
    finally:
        hook.remove()
    rows = {line[2:14].strip(): line[14:] for line in capsys.readouterr().out.splitlines()[1:]}
    (name, other), (_, own) = PRECISIONS if precision == "no" else reversed(PRECISIONS)
    is_measured = num_steps == 12
    expected = [own] * 4 + [other, own] * 4 * is_measured
    assert seen == [{(kind, dtype) for kind in (torch.nn.Linear, torch.nn.Conv2d)} for dtype in expected]
    assert (" instead of " in rows[name]) == is_measured and ("too short" in rows[name]) != is_measured
    assert ("faster" in rows) == (not is_measured)


@pytest.mark.parametrize(
    ("other", "measured", "words"),
    [
        ("bf16", (0.1, 0.14), "0.12 instead of 0.2 seconds a step: `--mixed_precision bf16` is faster"),
        ("no", (0.1, 0.14), "0.12 instead of 0.2 seconds a step: `--mixed_precision no` is faster"),
        ("bf16", (0.1, 0.2), "0.15 instead of 0.2 seconds a step: no clear difference, stay in float32"),
        ("no", (0.2, 0.25), "0.23 instead of 0.2 seconds a step: no clear difference, stay in bfloat16"),
        ("bf16", (0.3, 0.5), "0.4 instead of 0.2 seconds a step: stay in float32"),
    ],
)
def test_precision_is_advised_if_each_of_its_steps_is_faster(other, measured, words):
    assert gain_of_precision(other, [0.19, 0.21], list(measured)) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (
            (0.2, 0.1, 60, 1000),
            "0.1 instead of 0.2 seconds a step, after 60 seconds of compiling: pays after 600 steps",
        ),
        (
            (0.2, 0.1, 60, 599),
            "0.1 instead of 0.2 seconds a step, after 60 seconds of compiling: pays after 600 steps; leave",
        ),
        ((0.1, 0.2, 60, 1000), "0.2 instead of 0.1 seconds a step, after 60 seconds of compiling: leave out"),
    ],
)
def test_when_compiling_pays(seconds, words):
    assert gain_of_compiling(*seconds).startswith(words)
    assert ("leave out" in gain_of_compiling(*seconds)) == ("leave" in words)


def test_warm_up_that_does_not_end_is_said(caplog):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    make_lr_scheduler(OptimizationConfig(lr_warmup_steps=10), optimizer, 11)
    make_lr_scheduler(OptimizationConfig(lr_warmup_steps=10, lr_scheduler="constant"), optimizer, 5)
    assert caplog.text == ""
    make_lr_scheduler(OptimizationConfig(lr_warmup_steps=10), optimizer, 10)
    assert "`--lr_warmup_steps` 10 does not end within 10 steps" in caplog.text


def rates(num_steps: int, **settings) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    settings = OptimizationConfig(lr_scheduler="warmup_stable_decay", **settings)
    scheduler, found = make_lr_scheduler(settings, optimizer, num_steps), []
    for _ in range(num_steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return [*found, scheduler.get_last_lr()[0]]


def test_stable_schedule_rises_stays_and_falls_to_zero():
    expected = [0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert rates(10, lr_warmup_steps=2, lr_decay_share=0.4) == pytest.approx(expected)
    assert rates(4, lr_warmup_steps=0, lr_decay_share=1.0) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert rates(2000, lr_warmup_steps=50)[:800] == rates(1000, lr_warmup_steps=50)[:800]


def test_run_with_a_stable_schedule_is_made_longer_exactly(image_folder, tmp_path):
    """From a checkpoint before its decay it ends as if it had been planned so; here with Muon, whose state is kept too."""
    flags = TINY_DIT.replace("--max_train_steps 6", "") + " --lr_scheduler warmup_stable_decay --lr_warmup_steps 1"
    flags += " --optimizer muon"
    options = {"train_data_dir": image_folder, "vae": save_autoencoder(tmp_path / "vae")}
    run(train_dit, flags + " --max_train_steps 6 --lr_decay_share 0.5", output_dir=tmp_path / "short", **options)
    run(train_dit, flags + " --max_train_steps 10", output_dir=tmp_path / "long", **options)
    longer = flags + " --max_train_steps 10"
    results = ("pipeline",)
    resume(train_dit, longer, tmp_path / "short", tmp_path / "again", 3, results, **options)
    for name, tensor in load_file(tmp_path / "long" / TRANSFORMER).items():
        assert torch.equal(tensor, load_file(tmp_path / "again" / TRANSFORMER)[name])
