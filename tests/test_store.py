"""What is kept in files is whole, or said to be damaged; a fingerprint has the value that it always had."""

import contextlib
import copy
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from models import QUANTIZERS, make_autoencoder, make_prior_pipeline, make_vq_model

from dae_diffusers import store
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.errors import UserError
from dae_diffusers.hub.results import remove_leftovers
from dae_diffusers.weights import (
    ENCODER,
    autoencoder_fingerprint,
    have_other_encoders,
    model_fingerprint,
    weights_fingerprint,
    weights_fingerprint_of,
)


def test_fingerprints_keep_their_values():
    """They stand in checkpoints, in manifests and in names of folders: those of another version must still fit."""
    vae = make_autoencoder("none").to_diffusers()
    with torch.no_grad():
        for _, parameter in vae.named_parameters():
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape).float() / 7)
    parts = ("encoder", "quant_conv", "quantize", "post_quant_conv")
    assert autoencoder_fingerprint(vae) == "09790332697d54fd"
    assert autoencoder_fingerprint(vae, parts) == "200a7867e93d1fab"
    assert model_fingerprint(vae) == "21c8f10ae390b496"
    assert autoencoder_fingerprint(vae.half()) == "a46746db7fb9b621"
    assert store.fingerprint_of_json({"b": [1, 2.5, None], "a": "é", "c": torch.float16}) == "5c0d63da5f8053ac"
    images, _ = load_images(DataConfig(dataset_name="digits", image_channels=1, resolution=8))
    assert images.fingerprint == "371acd8540d9e500"


def test_fingerprints_are_of_the_numbers_alone():
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = store.fingerprint(["a", numbers])
    assert expected == store.fingerprint([b"a" + numbers.tobytes()])
    assert expected == store.fingerprint(each for each in ("a", torch.from_numpy(numbers)))
    assert expected == store.fingerprint(["a", torch.from_numpy(numbers.T.copy()).T])
    for value in (torch.tensor(3.0), torch.zeros(0), torch.ones(2, dtype=torch.bfloat16), torch.tensor([True])):
        assert len(store.fingerprint([value])) == 16


@pytest.mark.parametrize("kind", ["kl", "vq", "prior"])
def test_fingerprint_of_weights_is_that_of_their_files_in_any_form(kind, tmp_path):
    """Of the class that was trained and the one that is published, whole, in shards, and in half precision."""
    trained = make_autoencoder("none") if kind == "kl" else make_vq_model(auxiliary_decoder_type="none")
    model = trained.to_diffusers() if kind != "prior" else make_prior_pipeline().prior
    expected = weights_fingerprint(model.state_dict().values())
    if kind == "kl":  # a codebook keeps more while it trains
        trained.save_pretrained(tmp_path / "trained")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    halved = copy.deepcopy(model).half()
    halved.save_pretrained(tmp_path / "variant", variant="fp16")
    halved.save_pretrained(tmp_path / "whole", variant="fp16")  # beside
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert weights_fingerprint(halved.float().state_dict().values()) == expected
    assert {weights_fingerprint_of(folder) for folder in tmp_path.iterdir()} == {expected}
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 0.1
    model.save_pretrained(tmp_path / "whole")
    assert weights_fingerprint_of(tmp_path / "whole") != expected
    next((tmp_path / "whole").glob("*model.safetensors")).write_bytes(b"damaged")
    assert weights_fingerprint_of(tmp_path / "whole") is None is weights_fingerprint_of(tmp_path)


KINDS = {
    "tensors": (
        lambda path, of: store.cache_tensors(path, {"a": torch.arange(40.0), "b": torch.zeros(0, 2).half()}, of),
        lambda path, of: store.cached_tensors(path, of),
    ),
    "json": (
        lambda path, of: store.cache_json(path, {"x": [1.5, math.inf, "é"], 3: None}, of),
        lambda path, of: store.cached_json(path, of),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_and_every_cut_is_found(kind, tmp_path):
    keep, read = KINDS[kind]
    path, of = tmp_path / "kept", {"model": "m", "numbers": (1, 2)}
    with pytest.raises(store.NotCached) as problem:
        read(path, of)
    assert problem.value.missing
    keep(path, of)
    read(path, of)
    whole = path.read_bytes()
    keep(path, of)
    assert path.read_bytes() == whole  # equal content is equal bytes
    with pytest.raises(store.NotCached, match="made from something else") as problem:
        read(path, {"model": "other"})
    assert problem.value.of == {"model": "m", "numbers": [1, 2]}
    unseen = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            read(path, of)
        except store.NotCached as problem:
            assert problem.missing is False and "\n" not in str(problem)
        else:
            unseen += 1
    assert unseen <= 0.1 * len(whole)  # of blanks between numbers and names, which say nothing
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(store.NotCached):
            read(path, of)


def test_what_a_killed_process_was_writing_is_recognised_and_goes(tmp_path):
    path = tmp_path / "a.json"
    script = (
        "import os, signal, sys; from pathlib import Path; from dae_diffusers import store\n"
        "store._flush_and_rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "store.write_json(Path(sys.argv[1]), {'x': 1})"
    )
    process = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    (leftover,) = tmp_path.iterdir()
    assert process.returncode == -9 and leftover != path
    mine = tmp_path / f"b.json.{store._host()}-{os.getpid()}.tmp"  # of a process that runs
    elsewhere = tmp_path / "a.json.there-1.tmp"
    users = tmp_path / "notes.tmp"
    for each in (mine, elsewhere, users):
        each.touch()
    store.write_json(path, {"x": math.nan})
    assert json.loads(path.read_text()) == {"x": None}
    assert set(tmp_path.iterdir()) == {path, mine, elsewhere, users}
    os.utime(elsewhere, (0, 0))
    store.remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {path, mine, users}


def test_a_linked_folder_is_replaced_where_it_lies(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "vae").symlink_to(tmp_path / "disk")

    def save(folder):
        folder.mkdir()
        (folder / "config.json").touch()

    store.replace_folder(tmp_path / "vae", save)
    assert (tmp_path / "vae").is_symlink() and (tmp_path / "disk" / "config.json").exists()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_codebook_in_training_makes_the_codes_of_the_finished_one(quantizer, tmp_path):
    model = make_vq_model(quantizer)
    model.save_pretrained(tmp_path / "stage1")
    vae = model.to_diffusers()
    vae.save_pretrained(tmp_path / "vae")
    assert not have_other_encoders(tmp_path / "stage1", tmp_path / "vae", ENCODER)
    with torch.no_grad():
        vae.encoder.conv_out.bias.add_(0.5)
    vae.save_pretrained(tmp_path / "vae")
    assert have_other_encoders(tmp_path / "stage1", tmp_path / "vae")


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_folder_is_not_lost_when_its_replacement_is_killed(renames, tmp_path, monkeypatch):
    folder = tmp_path / "vae"

    def save(text):
        return lambda target: (target.mkdir(), (target / "config.json").write_text(text))

    store.replace_folder(folder, save("old"))
    left, rename = [renames], type(folder).rename

    def until_killed(path, target):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return rename(path, target)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(type(folder), "rename", until_killed)
        store.replace_folder(folder, save("new"))
    assert (tmp_path / "vae.old.tmp").exists() == (renames == 1) and folder.exists() == (renames != 1)
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
    assert (folder / "config.json").read_text() == ("new" if renames == 2 else "old")
    with pytest.raises(OSError, match="full"):
        store.replace_folder(folder, lambda _: (_ for _ in ()).throw(OSError("full")))
    assert (folder / "config.json").read_text() == ("new" if renames == 2 else "old")


def test_damaged_json_is_one_line_or_not_used(tmp_path, caplog):
    path = tmp_path / "run.json"
    assert store.read_json_or(path, {"seconds": 0}) == {"seconds": 0}
    for content in (b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b"[" * 10**5, b'{"a": ' * 10**5, b"1" * 5000):
        path.write_bytes(content)
        with pytest.raises(UserError) as problem:
            store.read_json(path)
        assert str(path) in str(problem.value) and "\n" not in str(problem.value)
        caplog.clear()
        assert store.read_json_or(path, {}) == {} and len(caplog.messages) == 1
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        store.read_json(path)


def test_damaged_rows_of_a_log_are_left_out_and_said_once(tmp_path, caplog):
    path = tmp_path / "log.jsonl"
    assert store.read_rows(path, step=int) == []
    path.write_bytes(b'{"step": 1, "x": 2}\n{"step": 2}\n{"step": 3')  # a kill while writing
    assert store.read_rows(path, step=int) == [{"step": 1, "x": 2}, {"step": 2}] and not caplog.messages
    bad = (b"[]", b"null", b"{}", b'{"step": null}', b'{"step": "2"}', b'{"step": true}', b"\xff", b"[" * 10**5, b"{")
    path.write_bytes(b'{"step": 1}\n' + b"\n".join(bad) + b'\n{"step": 9}\n')
    assert store.read_rows(path, step=int) == [{"step": 1}, {"step": 9}]
    assert len(caplog.messages) == 1 and f"{len(bad)} of its" in caplog.text and "line 2" in caplog.text


def test_store_needs_no_torch_to_read_and_write_text():
    subprocess.run(
        [sys.executable, "-c", "import sys, dae_diffusers.store; assert 'torch' not in sys.modules"], check=True
    )
