"""The SGD of the recorded training steps."""

LEARNING_RATE = 0.01
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
STEPS = 3
