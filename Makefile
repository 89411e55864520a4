# make demo: the whole recipe on this machine; make test: the whole suite; make bench: the operators
# beside plain PyTorch. All set up .venv first.
# megatron-core's CPU build of torch is at hand on Python 3.11, so that version is preferred.
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check
NATIVE := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h)

.PHONY: demo test bench lint clean

demo: .venv/.ready
	.venv/bin/q3mega run examples/laptop.yaml --run-dir runs/laptop

# A process for each core takes a test file at a time.
test: .venv/.ready
	.venv/bin/pytest -n logical

bench: .venv/.ready
	.venv/bin/python benchmarks/operators.py

lint: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run --Werror $(NATIVE) tests/ops/cuda_emulation/*.h

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f q3mega/_*.so q3mega/confine

# torch first: nothing after it may pick another build. megatron-core and emerging-optimizers
# declare Python 3.12 but run on 3.11, so they come by themselves, without their requirements,
# which are among ours.
.venv/.ready: pyproject.toml setup.py Makefile $(NATIVE)
	$(PYTHON) -m venv .venv
	$(PIP) 'torch==2.13.0; python_version < "3.12"' 'torch>=2.11; python_version >= "3.12"'
	$(PIP) 'setuptools>=77' wheel 'pybind11>=3'
	$(PIP) --no-build-isolation -e '.[dev]'
	$(PIP) --no-deps --ignore-requires-python megatron-core==0.19.2 emerging-optimizers==0.3.0
	touch $@
