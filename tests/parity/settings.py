"""The SGD of the recorded training steps."""

# Small, so that the rare ReLU that rounds to the other side moves later statistics little.
LEARNING_RATE = 0.001
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
STEPS = 3
