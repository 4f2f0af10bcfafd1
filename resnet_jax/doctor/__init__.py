"""`python -m resnet_jax doctor`: checks whether training runs on this machine, and how fast.

command.py   the process that people start: it starts a worker, prints its findings, and always ends
worker.py    the process that uses JAX, which may crash or hang: runs one check after the other
machine.py   checks that do not start JAX: packages, cores, memory, disks, accelerators
nvml.py      NVIDIA cards, as the driver lists them
devices.py   checks of the backend and the devices that JAX has found
speed.py     checks that compute: matrix products, copies, training steps
processes.py what the processes of a run exchange
reasons.py   explanations of errors from JAX, XLA and the drivers
findings.py  the result of a check, and formatting of numbers
"""
