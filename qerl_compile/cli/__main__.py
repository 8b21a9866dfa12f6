"""`python -m qerl_compile.cli` is `qerl-compile`."""

from qerl_compile.cli import main

main()
