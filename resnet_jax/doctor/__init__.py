"""`python -m resnet_jax doctor`: what JAX sees on this machine, and whether training runs on it.

command.py   the process that people start: it starts a worker, prints what it finds, ends in time
worker.py    the process that touches JAX, and may crash or hang: one check after the other
machine.py   checks that need no JAX: packages, cores, memory, disks, cards that are plugged in
devices.py   checks of the backend and the devices that JAX has found
speed.py     checks that compute: matrix products, copies, training steps
processes.py how this process was launched, and what the others of its run have found
reasons.py   what the errors of JAX, XLA and the drivers mean, and what to do
"""
