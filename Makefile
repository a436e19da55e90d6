# The five commands that people type; each is one of launchers/ or of .venv.
.PHONY: setup fast test format quickstart

setup: # .venv with the pinned stack; returns at once where it is there
	bash launchers/setup.sh

fast: # lint, types and the tests that start neither ranks nor servers
	bash launchers/test.sh --fast

test: # lint, types and every test that needs no GPU
	bash launchers/test.sh

format: setup # mends what can be mended
	.venv/bin/ruff format . && .venv/bin/ruff check --fix .

quickstart: # the whole job on this machine
	bash launchers/quickstart.sh
