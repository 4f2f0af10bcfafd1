"""What the comparison with PyTorch allows, and the SGD of its training steps."""

# Relative errors: forward (with running statistics), gradients.
FORWARD = 1e-5
GRADIENTS = 1e-4

LEARNING_RATE = 0.01
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
STEPS = 3
