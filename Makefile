# Short names for the commands of run.py.
PYTHON ?= python3

.PHONY: run hear serve test
run:
	$(PYTHON) run.py

test:
	$(PYTHON) run.py test

hear:
	$(PYTHON) run.py hear

serve:
	$(PYTHON) run.py serve
