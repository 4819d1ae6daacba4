# make demo: sample digits.  make test: lint and tests.  Both set up .venv first.
# PYTHON=/path/to/python takes an environment that has torch and the test packages, and downloads nothing.

VENV := .venv
COMMA := ,
HAVE_GPU := $(shell command -v nvidia-smi 2>/dev/null)
TORCH := torch==2.13.0

ifdef PYTHON
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
endif

.PHONY: env demo test lint docs sanitize wheels bench quality clean
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
	$(PY) -m mypy

# A process a core, each file in one of them: what it compiles is compiled once.
test: env $(if $(PYTHON),,lint)
	$(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile

# The pages and the API as a site, build/site/index.html; a warning is an error. It needs no network.
docs: env
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# The CPU kernels and the binding under the sanitizers of addresses and undefined behaviour, then of threads. OpenMP's own threads
# are not instrumented, so the last sees Python's threads alone; a leak is looked for in test_threads.py.
SANITIZED := step noise plan plan_kernel reference log_prob sample schedules fuzz threads
RUN = PYTHONSAFEPATH=1 PYTHONPATH=build/$@ LD_PRELOAD="$$(g++ -print-file-name=$(1)) $$(g++ -print-file-name=libstdc++.so)" \
	$(PY) -m pytest --deselect tests/test_threads.py::test_memory_does_not_grow

sanitize: sanitize-address sanitize-thread
sanitize-%: env
	rm -rf build/$@
	ERSDE_FAST_SANITIZE=$*$(if $(filter address,$*),$(COMMA)undefined) ERSDE_FAST_REQUIRE=1 \
		$(PY) -m pip install -q --no-build-isolation --no-deps --target build/$@ .
	$(if $(filter address,$*), \
		ASAN_OPTIONS=detect_leaks=0 $(call RUN,libasan.so) $(SANITIZED:%=tests/test_%.py), \
		OMP_NUM_THREADS=1 TSAN_OPTIONS=ignore_noninstrumented_modules=1 $(call RUN,libtsan.so) tests/test_threads.py tests/test_step.py)

# RESULTS=bench/results/NAME.json keeps the figures, and puts those of a GPU into docs/benchmarks.md.
bench: env
	$(PY) -m pytest bench $(if $(RESULTS),--benchmark-json=$(RESULTS))
	$(if $(RESULTS),$(PY) bench/report.py $(RESULTS))

# Measures what bench/quality/results.json lacks and writes the pages. Without that file the exact problems take more than half an hour of two
# cores; the networks' cells, left out without a GPU, about 45 minutes of an H100 (`bench/quality/study.py --cost --device cuda`, and 15 for
# the digits without guidance). They need the packages named in bench/quality/features.py and pictures.py; study.py shares them among GPUs.
quality: env
	$(PY) bench/quality/study.py

# A wheel a platform into dist/, for every Python and torch, by one compiler that knows them all (the first time it builds their C
# libraries, four minutes), then checked as far as one machine can. macOS's is never run here.
WHEELS := build/wheels
wheels:
	rm -rf dist build/*_*64
	python3 -m venv $(WHEELS)
	$(WHEELS)/bin/pip install -q "setuptools>=77" wheel auditwheel lief ziglang==0.17.1
	for platform in manylinux2014_x86_64 manylinux2014_aarch64 macosx_11_0_arm64 win_amd64; do \
		ERSDE_FAST_WHEEL=$$platform $(WHEELS)/bin/pip wheel -q --no-build-isolation --no-deps -w dist . || exit 1; \
	done
	$(WHEELS)/bin/python tests/check_wheels.py dist

clean:
	rm -rf $(VENV) build dist out ersde_fast/*.so ersde_fast/_kernels.* ersde_fast/_build_info.py *.egg-info
