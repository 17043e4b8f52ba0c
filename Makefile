PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check nightly clean

demo: .venv/ready
	$(BIN)/python scripts/demo.py

test: .venv/ready
	$(BIN)/pytest -m "not slow"

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

nightly: .venv/ready
	$(BIN)/pytest

# torch first, by its pin: whatever needs it then takes this build.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 12) else f"Python {sys.version.split()[0]} is not supported; use 3.11 or 3.12: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

clean:
	rm -rf .venv build dist src/*.egg-info
