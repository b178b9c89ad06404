# make train: from a fresh machine to a trained model. make test: from a fresh machine to a tested checkout.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# make test-exchange: test against other programs. make test-llama: test in llama.cpp, which is built from source. make test-browser: in Chromium.
# make gpu: test and measure on a CUDA GPU, in at most eight minutes.
.PHONY: train test coverage test-filesystems test-exchange test-llama test-browser gpu check soak soak-filesystems soak-exact bench bench-long docs clean

train: $(VENV)/.runtime
	ENABLE_CHECKPOINTS=true MODEL_TYPE=gpt2 $(BIN)/python training.py

# Test files are spread over so many processes; all tests of a file share one, and tests/conftest.py has the order.
# Python's own variables that containers set would make every program that a test starts compile all modules anew.
WORKERS ?= auto
test: check
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not soak and not exchange and not mounted"

# The same in one process, with a table of the branches that no test takes. What runs in processes of its own is not counted.
coverage: $(VENV)/.dev
	$(BIN)/python -m pytest -q --cov=milepost --cov=models --cov=training --cov=scripts --cov-branch --cov-report=term-missing:skip-covered \
	  -m "not soak and not exchange and not mounted"

# File systems that lack something, mounted: needs /dev/fuse, and fuse3 and libfuse2 of Debian. A test on rclone, sshfs, exfat or ntfs-3g
# is skipped, with the package that it needs, where that is missing.
test-filesystems: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "mounted and not soak"

test-exchange: $(VENV)/.exchange
	$(BIN)/python -m pytest -q tests/exchange tests/test_export.py tests/test_evaluate.py tests/test_huggingface.py
	$(BIN)/python -m pytest -q -m exchange

test-llama: $(VENV)/.llama
	$(BIN)/python -m pytest -q tests/llama

# The page of watch_runs.py in Chromium, which pip does not bring: apt-get install chromium.
test-browser: $(VENV)/.browser
	$(BIN)/python -m pytest -q tests/browser

# On one CUDA GPU: the promises (skipped in one line where there is none), then the table of benchmarks/gpu.py, which compares with
# nanoGPT and transformers where they are at hand. GPU_DEVICE=cpu runs the tests on the CPU, small.
gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -q tests/gpu --durations=5
	$(BIN)/python benchmarks/gpu.py

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers auto

soak: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "soak and not mounted"

# Killed at random times and at every call, on mounted file systems; needs rclone too.
soak-filesystems: $(VENV)/.dev
	$(BIN)/python -m pytest -q -s -m "soak and mounted"

# SETTINGS drawn at random, each trained alone and in pieces, and compared; a minute for about eight.
SETTINGS ?= 500
soak-exact: $(VENV)/.dev
	$(BIN)/python tests/soak_exact.py $(SETTINGS)

# NANOGPT_DIR names a checkout of nanoGPT to compare with, TINYSHAKESPEARE the text of tiny Shakespeare.
bench: $(VENV)/.dev
	for name in steps time_to_loss from_scratch lora generation serving startup data saving full_folder probe scaling; do $(BIN)/python benchmarks/$$name.py || exit; done

bench-long: $(VENV)/.dev
	$(BIN)/python benchmarks/time_to_loss.py long

# The documents as a site with search, in site/; a link that leads nowhere ends it. An environment of its own.
docs: .venv-docs/.docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.venv-docs/.docs: requirements-docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet -r requirements-docs.txt
	touch $@

clean:  # keeps checkpoints and runs
	rm -rf $(VENV) .venv-docs site data/.cache .pytest_cache .mypy_cache .ruff_cache

# A .venv of a Python that is too old, or that has gone, is made anew; pip shows what it downloads.
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
define environment
	@$(BIN)/python $(NEW_ENOUGH) 2>/dev/null || { $(PYTHON) $(NEW_ENOUGH) && $(PYTHON) -m venv --clear $(VENV); } || \
	  { echo "error: $(PYTHON) is not Python 3.11 or newer with venv: make PYTHON=python3.12, for instance" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	@echo "installing into $(VENV): some minutes and up to some gigabytes the first time"
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -r $(1)
	@touch $@
endef

$(VENV)/.runtime: requirements.txt
	$(call environment,requirements.txt)

$(VENV)/.dev: requirements.txt requirements-dev.txt
	$(call environment,requirements-dev.txt)

$(VENV)/.exchange: $(VENV)/.dev requirements-exchange.txt
	$(BIN)/python -m pip install --quiet -r requirements-exchange.txt
	touch $@

$(VENV)/.browser: $(VENV)/.dev requirements-browser.txt
	$(BIN)/python -m pip install --quiet -r requirements-browser.txt
	touch $@

$(VENV)/.llama: $(VENV)/.exchange requirements-llama.txt
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" $(BIN)/python -m pip install --quiet -r requirements-llama.txt
	touch $@
