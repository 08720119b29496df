# Short names for the commands; run.py does the work, with or without make.
PYTHON ?= python3

.PHONY: run hear test
run:
	$(PYTHON) run.py

test:
	$(PYTHON) run.py test

hear:
	$(PYTHON) run.py hear
