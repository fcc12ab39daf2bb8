"""Who serves a model, and with whom: pure functions over what the nodes announced, the same answer on each of them.

shape.py      a model, as far as memory and speed are concerned
machine.py    a node, likewise
splitting.py  one host and its workers: fit, order, shares, predicted speed
electing.py   the best host among those who could be, or what is missing
steering.py   when a better placement is worth a change
heirs.py      to whom a host leaves it no more
"""
