# Short names for the two commands; run.py does the work, with or without make.
PYTHON ?= python3

.PHONY: run test
run:
	$(PYTHON) run.py

test:
	$(PYTHON) run.py test
