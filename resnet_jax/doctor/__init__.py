"""`python -m resnet_jax doctor`: what JAX sees on this machine, and whether training runs on it.

command.py   the process that people start: it starts a worker, prints what it finds, ends in time
worker.py    the process that touches JAX, and may crash or hang: one check after the other
machine.py   checks that do not start JAX: packages, cores, memory, disks, accelerators
nvml.py      the NVIDIA cards as the driver lists them
devices.py   checks of the backend and the devices that JAX has found
speed.py     checks that compute: matrix products, copies, training steps
processes.py what the processes of a run tell each other
reasons.py   what the errors of JAX, XLA and the drivers mean, and what to do
findings.py  what a check returns, and how numbers are written
"""
