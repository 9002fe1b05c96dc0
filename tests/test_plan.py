"""What a resumed run must keep. What the scripts say about it is tested with them, in test_training.py and test_faults.py."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dae_diffusers.engine.plan import TRAINING_IMAGES, Plan
from dae_diffusers.errors import UserError

CHECKPOINT = Path("checkpoint-00000005")
PLAN = Plan({"resolution": 16, "pad": None}, {"stage1_steps": 4, "stage2_steps": 6}, 8, {TRAINING_IMAGES: "a"}, ["cat"])
OTHER_IMAGES = replace(PLAN, inputs={TRAINING_IMAGES: "b"})


def test_plan_comes_back_from_a_checkpoint():
    plan = replace(PLAN, images_changed=[2, 5])
    assert Plan.from_state(json.loads(json.dumps(plan.state())), default=OTHER_IMAGES) == plan


def test_what_earlier_versions_did_not_save_counts_as_unchanged():
    for state in ({}, {"plan": None}, {"plan": {"settings": PLAN.settings, "steps": PLAN.steps}}):
        before = Plan.from_state(state, default=PLAN)
        assert PLAN.resume(before, CHECKPOINT, 5, num_epochs=2.0) == PLAN


def test_steps_at_which_the_images_changed_add_up():
    again = replace(PLAN, inputs={TRAINING_IMAGES: "c"})
    other = OTHER_IMAGES.resume(PLAN, CHECKPOINT, 5, accepts_images=True)
    assert (PLAN.images_changed, other.images_changed) == ([], [5])
    assert again.resume(other, CHECKPOINT, 7, accepts_images=True).images_changed == [5, 7]
    assert other.resume(other, CHECKPOINT, 9).images_changed == [5]


def test_other_images_of_a_stream_are_refused_even_if_they_are_accepted():
    with pytest.raises(UserError, match=r"the training images changed since .* in another `output_dir`\.$"):
        OTHER_IMAGES.resume(PLAN, CHECKPOINT, 5, accepts_images=True, is_stream=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": {"stage1_steps": 3, "stage2_steps": 6}}, "`stage1_steps` 4, but now it is 3. Leave out"),
        ({"steps": {"stage1_steps": 4, "stage2_steps": 0}}, "give `stage2_steps` of at least 1 to continue"),
        ({"steps": {"stage2_steps": 6}}, "began with `stage1_steps`, but this run begins with `stage2_steps`"),
        ({"images_per_step": 4}, "with 8 images in a step, .* `stage1_steps 4` and `stage2_steps 6`"),
        ({"settings": {"resolution": [16, 32]}}, "`resolution` 16, but now it is 16 32"),
        ({"inputs": PLAN.inputs | {"the moon": "c"}}, "without the moon, which this run has"),
        ({"inputs": {}}, "with the training images, which this run lacks"),
    ],
)
def test_plan_that_contradicts_the_checkpoint_is_refused(change, message):
    plan = replace(PLAN, **change)
    with pytest.raises(UserError, match=message):
        plan.resume(PLAN, CHECKPOINT, 5, num_epochs=2.0)
    if "inputs" in change:
        assert plan.resume(PLAN, CHECKPOINT, 5, may_lack=["the moon", TRAINING_IMAGES]) == plan


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        (True, None, "with `a`, but now it is left out. Give it again, or"),
        (True, False, "with `a`, but now it is off. Give it again, or"),
        (False, True, "without `a`, but now it is on. Give `a no`, or"),
        (None, True, "without `a`, but now it is on. Continue without it, or"),
        (None, 0.0, "without `a`, but now it is 0.0. Continue without it, or"),
        (0.0, 1.0, "with `a` 0.0, but now it is 1.0. Continue with 0.0, or"),
    ],
)
def test_a_switch_has_no_value_in_a_message(was, now, message):
    before, plan = (replace(PLAN, settings={"a": value}) for value in (was, now))
    with pytest.raises(UserError, match=f"was trained {re.escape(message)} train in another `output_dir`"):
        plan.resume(before, CHECKPOINT, 5)
