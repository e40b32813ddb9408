# Everything here sets itself up: it needs Python >= 3.10, git and make. The environments are kept outside the tree (tools/env.py).

PYTHON ?= python3
# more arguments for the command of a target: make test ARGS="-k lora -x"
ARGS ?=
IN_ENV = @$(PYTHON) tools/env.py
# tests in as many processes as there are cores, at most four, a file of them in one, in the order of tests/conftest.py;
# ARGS="-n0" runs all in one process
PYTEST = -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo study test test-a1111 test-forge test-all test-webui faults soak fuzz check format bench env

help:  ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

demo:  ## the whole story on the bundled model, with pictures and a report: a minute or so, no network
	$(IN_ENV) newest -m lib_dpo demo --overwrite $(ARGS)

study:  ## the same with 500 pictures a side and finer strengths: a quarter of an hour or so
	$(IN_ENV) newest -m lib_dpo demo --study --overwrite --json study/figures.json $(ARGS)

test:  ## all tests, on the newest versions
	$(IN_ENV) newest $(PYTEST) $(ARGS)

test-a1111:  ## the tests on what AUTOMATIC1111's WebUI ships (needs Python 3.10)
	$(IN_ENV) a1111 $(PYTEST) -m "not gpu and not newest" $(ARGS)

test-forge:  ## the tests on what Forge ships (needs Python 3.10)
	$(IN_ENV) forge $(PYTEST) -m "not gpu and not newest" $(ARGS)

test-all: test test-a1111 test-forge  ## the tests on all three sets of versions

test-webui:  ## drive a real WebUI on the CPU: WEBUI=its folder WEBUI_PYTHON=its Python
	$(if $(and $(WEBUI),$(WEBUI_PYTHON)),,$(error give WEBUI=<folder of an installed WebUI> and WEBUI_PYTHON=<its Python>))
	$(IN_ENV) newest -m pytest tests_webui --webui="$(WEBUI)" --webui-python="$(WEBUI_PYTHON)" $(ARGS)

soak:  ## 500 random steps on one process, and ten minutes of fifty clients at once: half an hour or so
	@DPO_SOAK=500 DPO_LOAD=600 $(PYTHON) tools/env.py newest $(PYTEST) tests/test_soak.py tests/test_load.py $(ARGS)

faults:  ## kills, full disks, no memory and inputs that change, many times each: half an hour or so
	@DPO_FAULTS=280 $(PYTHON) tools/env.py newest $(PYTEST) tests/test_faults.py tests/test_reading_faults.py tests/test_hosts.py $(ARGS)

fuzz:  ## made-up files, LoRA keys, texts and API requests, 40 times as many as in the tests: half an hour or so
	@DPO_FUZZ=40 $(PYTHON) tools/env.py newest $(PYTEST) tests/test_fuzz_*.py $(ARGS)

check:  ## lint, format and types
	$(IN_ENV) newest -m ruff check .
	$(IN_ENV) newest -m ruff format --check .
	$(IN_ENV) newest -m mypy

format:  ## format the code and mend what ruff can mend
	$(IN_ENV) newest -m ruff format .
	$(IN_ENV) newest -m ruff check --fix .

bench:  ## the benchmarks
	$(IN_ENV) newest -m bench $(ARGS)

env:  ## build the newest environment where needed; the last line is the path of its Python
	$(IN_ENV) newest
