# make demo    learn the mixture of the embedded example on two CPU ranks
# make test    run the tests              make checks   lint and types
# make test-long   the tests left out above: large configurations, layout search, GGUF
# make mutants  which small changes of the library would no test notice?  (mutants/report.txt)
# make fuzz    what nobody should give prepare, sample and config.json, ten minutes each
# make bench   run the benchmarks         make clean    remove what make made
# make docs    the documentation's site, in site/         make dist   sdist and wheel, in dist/

# PYTHON=...   the Python to make the environment with, 3.12 or 3.13 [the first that is found]
# TORCH=...    cpu or cuda: the build of torch, on Linux [cuda where there is an NVIDIA driver]
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-long mutants fuzz checks lint types bench docs dist clean environment
# Nothing that the tests start may wait for a hub. They start many processes, which share what Python
# has compiled, even where the shell says not to keep it.
test: export HF_HUB_OFFLINE = 1
test: export PYTHONDONTWRITEBYTECODE =
environment: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml tools/environment.sh
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" tools/environment.sh $(VENV)
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed requirements-test.txt
	@echo "environment: the packages of requirements-test.txt"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-test.txt
	touch $@

# Apart: on the usual path Megatron would find it in every test. Without it tests/te skips.
TE := 2.20.2
$(VENV)/.installed-te-$(TE): $(VENV)/.installed
	@echo "environment: the Python of Transformer Engine, apart"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(VENV)/te transformer-engine==$(TE) && touch $@ || echo "environment: not to be had"

demo: environment
	$(BIN)/python examples/demo/run.py --output demo-run

# Those of SLURM would leave half of two cores idle: they run beside the others, told at the end.
test: $(VENV)/.installed-test $(VENV)/.installed-te-$(TE)
	@trap 'kill $$slurm 2> /dev/null' EXIT; trap 'exit 1' INT TERM; log=$$(mktemp); \
	$(BIN)/python -m pytest -m "slurm and not long" tests/slurm > $$log 2>&1 & slurm=$$!; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25 \
		-m "not long and not slurm"; others=$$?; \
	wait $$slurm; of_slurm=$$?; echo "tests/slurm:"; cat $$log; rm $$log; \
	[ $$others = 0 ] && [ $$of_slurm = 0 ]

test-long: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m long

mutants: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps mutmut==3.8.1 libcst==1.9.0
	$(BIN)/python tools/mutants.py

fuzz: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 $(BIN)/python tools/fuzz.py

checks: lint types

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: environment
	$(BIN)/mypy

bench: environment
	$(BIN)/python benchmarks/step_cost.py

docs: environment
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements-test.txt mkdocs-material
	$(BIN)/mkdocs build --strict --site-dir site

dist: environment
	rm -rf dist
	$(BIN)/python -c "from setuptools.build_meta import *; build_sdist('dist'); build_wheel('dist')"

clean:
	rm -rf $(VENV) demo-run mutants site dist build *.egg-info .mypy_cache .ruff_cache .hypothesis
