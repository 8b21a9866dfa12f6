"""Doors: our models under the names by which other libraries open models. Each door is one file and one library.

transformers    `AutoModelForCausalLM.from_pretrained(DIR)`            doors/transformers_quantizer.py
torchao         `torchao.quantize_(model, QerlNVFP4Config())`          doors/torchao_handler.py

A door calls a library's public registry and nothing else. It is imported when both sides are there: the transformers
door as soon as transformers' registry is (the hook is in `qerl_compile/__init__.py`), the torchao door when somebody
asks for its config, which nobody can use without asking for it.
"""
