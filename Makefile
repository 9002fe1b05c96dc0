# make demo: sets up, trains on the embedded digits, draws a grid and checks it. Look in runs/demo.
# make demo-vq: the same with a codebook and an autoregressive prior. Look in runs/demo-vq.
# make test: sets up, runs the tests.
# make space: runs the app of a Space, with the digits model of `make demo`, on http://127.0.0.1:7860.
# make docs: the API reference, into build/docs.
# All make .venv with the versions of constraints.txt; PYTHON=python3.12 chooses another Python.

PYTHON ?= python3
BIN := .venv/bin
CORES := $(shell $(PYTHON) -c "import os; print(os.cpu_count())")
LAUNCH := $(BIN)/accelerate launch --config_file training/configs/accelerate/single.yaml --num_cpu_threads_per_process $(CORES)

.PHONY: demo demo-vq test space docs lint clean

demo: .venv/installed
	$(LAUNCH) training/train_dae.py --config training/configs/digits_dae.yaml --output_dir runs/demo --resume_from_checkpoint latest
	$(LAUNCH) training/train_dit.py --config training/configs/digits_dit.yaml --vae runs/demo/vae --output_dir runs/demo --resume_from_checkpoint latest
	$(BIN)/python benchmarks/check_digits.py runs/demo

demo-vq: .venv/installed
	$(LAUNCH) training/train_dae.py --config training/configs/digits_vq.yaml --output_dir runs/demo-vq --resume_from_checkpoint latest
	$(LAUNCH) training/train_vqgan_prior.py --config training/configs/digits_vqgan_prior.yaml --vae runs/demo-vq/vae --output_dir runs/demo-vq --resume_from_checkpoint latest
	$(BIN)/python benchmarks/check_digits.py runs/demo-vq

test: .venv/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/pytest -n 2 --dist worksteal

space: .venv/installed
	test -f runs/demo/metrics.json || $(MAKE) demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[space]"
	$(BIN)/python training/push.py runs/demo demo/digits --license cc-by-4.0 --export_dir runs/demo/hub
	MODEL=runs/demo/hub GRADIO_SERVER_NAME=127.0.0.1 GRADIO_ANALYTICS_ENABLED=False $(BIN)/python dae_diffusers/hub/space/app.py

docs: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python docs/reference.py build/docs

lint: .venv/installed
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf .venv build dist *.egg-info

# torch comes first, so that nothing else chooses its build.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
