# make demo           install, train on embedded drawn scenes, evaluate, draw (runs/demo/)
# make test           install, run all tests
# make test-extras    install the optional packages, run the tests that need them
# make lint           style and types
# make check-wheel    build the wheel, install it in an empty environment, train 30 steps and predict without the checkout
# make test-lowest    run the tests with the lowest versions that pyproject.toml allows

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-extras lint check-wheel test-lowest clean

demo: $(VENV)/installed
	$(BIN)/vg demo

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-extras: $(VENV)/installed-extras
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/web tests/export tests/inference tests/labeling tests/training/test_stream.py tests/test_notebooks.py

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-wheel:
	rm -rf build/wheel && mkdir -p build/wheel/elsewhere
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --constraint constraints.txt build/wheel/*.whl
	cd build/wheel/elsewhere && ../venv/bin/vg demo train.max_steps=30 data.workers=0
	cd build/wheel/elsewhere && ../venv/bin/vg predict runs/demo runs/demo/predictions.png "the red circle"

test-lowest:
	$(PYTHON) -m venv build/lowest
	build/lowest/bin/python -m pip install --quiet uv
	build/lowest/bin/uv pip install --quiet --python build/lowest/bin/python --resolution lowest-direct --editable '.[test]'
	OMP_NUM_THREADS=1 build/lowest/bin/python -m pytest -n auto

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "vg needs Python 3.10 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

$(VENV)/installed-lint: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lint]'
	touch $@

$(VENV)/installed-extras: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,web,export,diffusion,captions,ray,streaming]' supervision playwright
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
