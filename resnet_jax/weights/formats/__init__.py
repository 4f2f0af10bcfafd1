"""One module per format of weight files: bytes to arrays by name, within bounds.

Files may come from strangers. Every reader compares what a header claims with the bytes that are
there before it allocates memory, executes nothing that the file holds, and raises WeightsError.
Reading takes a few times the size of the file, and at most a few times `SMALL` beyond that.
"""

# Bounds on what a compressed file may expand to: this multiple of its size, or this many bytes
# whatever its size. Trained weights hardly compress; zeros, and archives made to exhaust memory,
# compress a thousand times.
MAX_UNPACKED = 16
SMALL = 2**26
# ResNet-1202, the deepest network here, has 7,000 tensors and a safetensors header of 1 MB.
MAX_TENSORS = 100_000
MAX_HEADER = 2**24
