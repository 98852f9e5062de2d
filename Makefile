# The two commands of the README: `make demo` and `make test`. Each makes the environment it needs in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

ifeq ($(shell uname -s),Linux)
EXTRAS := cpu,test
# Found when a recipe runs, so that an OpenBLAS installed a moment ago counts.
OPENBLAS = $$(PATH="$$PATH:/sbin:/usr/sbin" ldconfig -p 2>/dev/null | awk '/libopenblas\.so\.0 /{print $$NF; exit}')
WITH_BLAS = LD_PRELOAD="$(OPENBLAS)"
else
EXTRAS := test
WITH_BLAS =
endif

.PHONY: demo test pytest lint format env openblas clang clean

demo: env ## Write text with the embedded model, several tokens per forward pass
	$(WITH_BLAS) $(BIN)/mtp-mlx generate --model smollm2-135m --prompt "Explain why the sky is blue." --max-tokens 120 --color

test: pytest lint ## Run every check

pytest: env clang
	OPENBLAS_NUM_THREADS=1 $(WITH_BLAS) $(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/metal_kernels --ignore tests/tools
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/metal_kernels tests/tools

lint: env ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_types.py

format: env ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

env: $(VENV)/ready openblas

$(VENV)/ready: pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mtp-mlx needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]"
	@touch $@

# MLX's wheel for Linux brings a BLAS that is many times slower than OpenBLAS.
openblas:
ifeq ($(shell uname -s),Linux)
	@if [ -z "$(OPENBLAS)" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libopenblas0-pthread >/dev/null \
	      || echo "OpenBLAS could not be installed; MLX will be slow on this CPU." >&2; \
	  else \
	    echo "OpenBLAS was not found, so MLX will be slow on this CPU: install libopenblas0-pthread (or openblas)." >&2; \
	  fi; \
	fi
endif

# The tests execute the Metal kernels with an emulator, which needs clang 17 or later (a Mac has Metal instead).
CLANG = $$(for version in 22 21 20 19 18 17; do command -v clang++-$$version && break; done)

clang: env
ifeq ($(shell uname -s),Linux)
	@if [ -z "$(CLANG)" ] && ! $(BIN)/python -c 'import ziglang' 2>/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	    && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq clang-19 >/dev/null; then :; \
	  else \
	    echo "No clang 17 or later was found: taking the one that comes with the package ziglang." >&2; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check ziglang; \
	  fi; \
	fi
endif

clean: ## Remove the environment and what tools left behind
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
