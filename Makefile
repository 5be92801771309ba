.PHONY: check test docs demo

check:          ## lint, format, types
	ruff check .
	ruff format --check .
	mypy

test:           ## everything that needs no GPU
	pytest

docs:           ## pages made from the code
	python -m lora_scripts.settings_page > docs/settings.md

demo:
	lora-scripts demo
