"""Reinforcement learning on a transformed model, one idea per file.

A task gives rows, a prompt format turns a row into token ids, reward functions score what the model made of them,
advantages compare the members of a group, a loss turns advantages into a gradient, and a schedule says how much noise
the rollouts carry. Everything here works on plain tensors, strings and numbers: none of it knows a model class, so
each piece can be read, tested and used alone.

Interfaces follow TRL where users know them (rows with a `prompt` column, keyword reward functions, metric names), so
that a reward function or a dataset written for one works in the other.
"""
