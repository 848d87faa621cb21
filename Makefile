# `make` lists the targets. ARGS is handed to cargo test, for example
#   make test ARGS='--test integration'
CARGO ?= cargo
ARGS ?=
# So that tests can make a worker abort at a given step.
FAILPOINTS := --features failpoints

# Most tests wait for something most of the time.
export RUST_TEST_THREADS ?= 4

.DEFAULT_GOAL := help
.PHONY: help build check fmt test dev

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build the debug binary
	$(CARGO) build --locked

check: ## Check the format and the lints, as CI does
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO) clippy --locked --workspace --all-targets $(FAILPOINTS) -- -D warnings

fmt: ## Format the sources
	$(CARGO) fmt

# Everything is compiled first, so that a mistake shows before services start
# and no service idles while the compiler runs.
test: ## Run all tests, with PostgreSQL and Google's emulator started for them
	$(CARGO) build --locked $(FAILPOINTS)
	$(CARGO) test --locked --workspace --all-targets $(FAILPOINTS) --no-run $(ARGS)
	tests/services/run.sh $(CARGO) test --locked --workspace --all-targets $(FAILPOINTS) $(ARGS)
	$(CARGO) test --locked --workspace --doc $(FAILPOINTS)
	tests/services/contained.sh tests/services/python-client.sh
	tests/services/contained.sh tests/python/examples.sh

dev: ## Open a shell with the test services running, for single tests
	@echo 'Ready when the prompt shows: cargo test finds the services. Leaving the shell stops them, and all that was started in it.'
	tests/services/run.sh $${SHELL:-bash}
