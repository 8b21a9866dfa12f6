"""`python -m qerl_compile` is `qerl-compile`, as torchrun starts it."""

from qerl_compile.cli import main

main()
