# make train: from a fresh machine to a trained model. make test: from a fresh machine to a tested checkout.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# make test-exchange: test against other programs. make test-llama: test in llama.cpp, which is built from source.
.PHONY: train test test-filesystems test-exchange test-llama check soak soak-exact bench bench-long clean

train: $(VENV)/.runtime
	ENABLE_CHECKPOINTS=true MODEL_TYPE=gpt2 $(BIN)/python training.py

test: check
	$(BIN)/python -m pytest -q -m "not soak and not exchange and not mounted"

# File systems that lack something, mounted: needs /dev/fuse, and fuse3 and libfuse2 of Debian.
test-filesystems: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m mounted

test-exchange: $(VENV)/.exchange
	$(BIN)/python -m pytest -q tests/exchange tests/test_export.py tests/test_evaluate.py tests/test_huggingface.py
	$(BIN)/python -m pytest -q -m exchange

test-llama: $(VENV)/.llama
	$(BIN)/python -m pytest -q tests/llama

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m soak

# SETTINGS drawn at random, each trained alone and in pieces, and compared; a minute for about eight.
SETTINGS ?= 500
soak-exact: $(VENV)/.dev
	$(BIN)/python tests/soak_exact.py $(SETTINGS)

# NANOGPT_DIR names a checkout of nanoGPT to compare with, TINYSHAKESPEARE the text of tiny Shakespeare.
bench: $(VENV)/.dev
	for name in steps time_to_loss lora generation startup data saving full_folder scaling; do $(BIN)/python benchmarks/$$name.py || exit; done

bench-long: $(VENV)/.dev
	$(BIN)/python benchmarks/time_to_loss.py long

clean:  # keeps checkpoints and runs
	rm -rf $(VENV) data/.cache .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.runtime: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.dev: requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)/.exchange: $(VENV)/.dev requirements-exchange.txt
	$(BIN)/python -m pip install --quiet -r requirements-exchange.txt
	touch $@

$(VENV)/.llama: $(VENV)/.exchange requirements-llama.txt
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" $(BIN)/python -m pip install --quiet -r requirements-llama.txt
	touch $@
