# make demo: sample digits.  make test: lint and tests.  Both set up .venv first.
# PYTHON=/path/to/python takes an environment that has torch and the test packages, and downloads nothing.

VENV := .venv
HAVE_GPU := $(shell command -v nvidia-smi 2>/dev/null)
TORCH := torch==2.13.0

ifdef PYTHON
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
endif

.PHONY: env demo test lint bench quality clean
.DELETE_ON_ERROR:

env: $(if $(PYTHON),build,$(VENV)/done)

# A torch that imports is used as it is; otherwise one is installed, without CUDA where there is no NVIDIA GPU: from the
# package index at hand if that has a CPU build, else by uv, which knows where PyTorch keeps its builds.
$(VENV)/done: pyproject.toml setup.py $(wildcard csrc/*)
	python3 -c "import torch" 2>/dev/null && site=--system-site-packages; python3 -m venv $$site $(VENV)
	$(PY) -m pip install -q --upgrade "setuptools>=77" wheel ninja pybind11
	$(PY) -c "import torch" 2>/dev/null || $(if $(HAVE_GPU),,$(PY) -m pip install -q "$(TORCH)+cpu" ||) \
		{ $(PY) -m pip install -q uv && $(PY) -m uv pip install --python $(PY) --torch-backend=auto "$(TORCH)"; }
	$(PY) -m pip install -q --no-build-isolation -e ".[test]"
	$(PY) -m pip install -q --no-deps k-diffusion==0.1.1.post1
	touch $@

.PHONY: build
build:
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .

demo: env
	$(PY) examples/demo.py

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

test: env $(if $(PYTHON),,lint)
	$(PY) -m pytest

# RESULTS=bench/results/NAME.json keeps the figures, and puts those of a GPU into the README.
bench: env
	$(PY) -m pytest bench $(if $(RESULTS),--benchmark-json=$(RESULTS))
	$(if $(RESULTS),$(PY) bench/report.py $(RESULTS))

# Measures what bench/quality/results.json lacks; remove that file to measure all of it anew (half an hour).
quality: env
	$(PY) bench/quality/study.py

clean:
	rm -rf $(VENV) build out ersde_fast/*.so ersde_fast/_build_info.py *.egg-info
