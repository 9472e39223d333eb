# Everything a person or CI does with this project. `make help` lists it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXAMPLE := examples/chatglm-6b-tiny
CHECKPOINT ?= $(EXAMPLE)
OUT    ?= out/pipeline
JOBS   ?= 2

.PHONY: help setup test lint types unit slow pipeline demo picture clean

help:      ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  \1\t/' | expand -t 14

setup: $(STAMP)  ## make .venv and install the project with every extra, versions pinned
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

test: lint types pipeline unit  ## every check: lint, types, the pipeline on the example, the tests

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy, strict
	$(BIN)/mypy

unit: $(STAMP)  ## the fast tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

slow: $(STAMP)  ## the tests that take longer
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m slow

pipeline: $(STAMP)  ## inspect, split and verify CHECKPOINT=… into OUT=… (default: the example)
	$(BIN)/glmexport inspect $(CHECKPOINT)
	$(BIN)/glmexport split $(CHECKPOINT) -o $(OUT) --force
	$(BIN)/glmexport verify $(OUT) $(CHECKPOINT) --json $(OUT).json

demo: $(STAMP)  ## the main job on the example: split, then the verification report
	$(BIN)/glmexport split $(EXAMPLE) -o out/demo --force
	$(BIN)/glmexport inspect out/demo
	$(BIN)/glmexport verify out/demo $(EXAMPLE)

picture: $(STAMP)  ## draw docs/verify.svg, the picture in the README, from a real run
	$(BIN)/python docs/picture.py docs/verify.svg

clean:     ## remove what was built, but for .venv
	rm -rf out build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
